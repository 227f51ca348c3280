#!/usr/bin/env python3
"""Train the tokenizer of untrained:dnabert_s on a FASTA file and seeded random DNA.

It has the special tokens, ids and template of DNABERT-S, but its own merges.

    PYTHONPATH=scripts python tests/support/make_untrained_tokenizer.py --fasta tests/data/NC_005816.fna \\
        --output scripts/seqmill/spec/untrained_dnabert_s/tokenizer.json
"""

import argparse
import random
import sys
from pathlib import Path

from seqmill.cli import program

VOCABULARY = 4096
SPECIAL_TOKENS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]  # ids 0 to 4
WORD_BASES = 1000  # training counts the pairs within words
RANDOM_WORDS = 2000
SEED = 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, required=True, help="nucleotides; plain, gzip, bgzip or zstd")
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer to write (tokenizer.json)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()

    def work() -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

        from seqmill.base.files import whole_or_absent

        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, limit_alphabet=4, show_progress=False
        )
        tokenizer.train_from_iterator(training_words(arguments.fasta), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
        )
        with whole_or_absent(arguments.output) as temporary:
            temporary.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")

    return program.exit_code_of(work)


def training_words(fasta: Path) -> list[str]:
    """Return the file's records in words of WORD_BASES, then enough random words for a vocabulary of 4096."""
    from seqmill.index.fasta import FastaFile
    from seqmill.index.letters import NucleotideLetters
    from seqmill.index.segments import cut

    letters = NucleotideLetters()
    records = [letters.clean(record.body) for block in FastaFile(fasta).blocks() for record in block]
    generator = random.Random(SEED)
    records += [generator.randbytes(WORD_BASES).translate(b"ACGT" * 64) for _ in range(RANDOM_WORDS)]
    return [word.decode("ascii") for record in records for word in cut(record, WORD_BASES, WORD_BASES)]


if __name__ == "__main__":
    sys.exit(main())
