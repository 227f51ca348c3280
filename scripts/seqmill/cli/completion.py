"""Print a script with which bash or zsh complete the command `seqmill`: its subcommands, options, and files."""

import argparse
from pathlib import Path

from seqmill.cli.main import COMMANDS, make_parser
from seqmill.version import __version__

EPILOG = """examples:
  mkdir -p ~/.local/share/bash-completion/completions ~/.zfunc
  seqmill completion bash > ~/.local/share/bash-completion/completions/seqmill
  seqmill completion zsh > ~/.zfunc/_seqmill

bash reads that file if the package bash-completion is installed; otherwise add `source FILE` to ~/.bashrc. For zsh, add
`fpath=(~/.zfunc $fpath)` to ~/.zshrc before compinit.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that will read the script")


def work(arguments: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(whole_parser(), arguments.shell))


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all subcommands, whose path arguments complete file names."""
    import shtab

    parser = argparse.ArgumentParser("seqmill")
    parser.add_argument("--version", action="version", version=__version__, help="show the version")
    subcommands = parser.add_subparsers()
    for name, line in COMMANDS.items():
        made = make_parser(name)
        for action in made._actions:
            if action.type is Path or action.dest == "fasta":  # `run` takes a FASTA file as text
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's way
        subcommands.add_parser(name, help=line, description=line, parents=[made], add_help=False)
    return parser
