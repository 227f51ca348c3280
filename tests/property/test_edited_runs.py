"""Whatever is edited between runs, a run that succeeds gives the same bits as a fresh run."""

import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from edited_run import EditedRun
from seqmill.run.stale import Refusal

SEQUENCES, EDITS = 120, 5
GROUPS = 12


@pytest.mark.full
@pytest.mark.parametrize("group", range(GROUPS))
def test_a_run_gives_what_is_asked_for(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"refused": 0, "kept": 0, "computed": 0}
    for seed in range(group * SEQUENCES // GROUPS, (group + 1) * SEQUENCES // GROUPS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        run = EditedRun(folder, random.Random(seed))
        run.run()
        for _ in range(EDITS):
            run.edit()
            if run.random.random() < 0.2:  # killed before the merge
                with suppress(Refusal):
                    run.run(until=run.random.choice(["index", "embed"]))
                run.edit()
            outcome = judge(run)
            outcomes[outcome] += 1
        shutil.rmtree(folder)
    assert all(outcomes.values()), outcomes


def judge(run: EditedRun) -> str:
    """Run and compare with a fresh run; after a refusal, move the results away and run again."""
    context = f"seed {run.folder.name}: {run.edits}"
    before = (run.results / "embeddings.h5").read_bytes() if (run.results / "embeddings.h5").exists() else None
    try:
        run.run()
    except Refusal:
        assert before is None or (run.results / "embeddings.h5").read_bytes() == before, context
        shutil.rmtree("results")
        run.run()
        assert run.found() == run.expected(), context
        return "refused"
    assert run.found() == run.expected(), context
    assert run.run() == [], context  # nothing is computed again without need
    return "kept" if before == (run.results / "embeddings.h5").read_bytes() else "computed"
