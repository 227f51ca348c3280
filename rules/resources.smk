# What jobs ask for: threads, memory, time.

# Taken for the longest sequence where long_sequences is full, in what a job asks for.
FULL_LENGTH = 50_000
PACKS_ON_THEIR_WAY = 3


def index_threads(wildcards):
    return min(CORES, 8) if dataset_of(wildcards).model.family == DNABERT_S else 1


def index_runtime(wildcards, attempt):
    """The time limit of build_index in minutes."""
    dataset = dataset_of(wildcards)
    return index_minutes(dataset.fasta, length_policy(dataset).copies, attempt)


def longest_segment(dataset):
    """About how many tokens go through the model at once."""
    letters = length_policy(dataset).max_length or FULL_LENGTH
    return tokens_of(dataset.model.family, letters)


def kept_tokens(dataset):
    """Tokens whose vectors a worker keeps until a sequence is whole, times layers: of windows, and with per_residue."""
    if dataset.model.family == DNABERT_S:
        return 0
    windows = length_policy(dataset).long_sequences == "window"
    longest = FULL_LENGTH if windows else longest_segment(dataset)
    if (
        config["per_residue"] and USE_GPU
    ):  # those of some packs, on their way from the GPU to the disk
        longest = max(longest, PACKS_ON_THEIR_WAY * MAX_PACK_TOKENS)
    return longest * len(config["layers"]) if windows or config["per_residue"] else 0


def shard_memory(wildcards, threads, attempt):
    """What embed_shard asks a cluster for, in MB."""
    dataset = dataset_of(wildcards)
    on_cpu = 0 if USE_GPU else threads
    settings = (longest_segment(dataset), on_cpu, attempt, kept_tokens(dataset))
    return memory_mb(dataset.model, *settings)


def shard_runtime(wildcards, threads, attempt):
    """The time limit of embed_shard in minutes; Snakemake asks again once the index is built."""
    dataset = dataset_of(wildcards)
    family, policy = dataset.model.family, length_policy(dataset)
    index = Path("results", dataset.name, dataset.model.slug, "index.h5")
    tokens = -(-tokens_in(index, dataset.fasta, family, policy.copies) // int(wildcards.world_size))
    settings = (longest_segment(dataset), config["precision"], USE_GPU, threads, attempt)
    return runtime_minutes(dataset.model, tokens, *settings)


def plan_memory(wildcards, threads, attempt):
    """What plan_shards asks a cluster for, in MB: enough for build_index, then for a worker."""
    return max(8000 * attempt, shard_memory(wildcards, threads, attempt))
