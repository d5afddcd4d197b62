"""Clusterings whose documents are assigned by Ray's workers: what one process makes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.corpus import domains, job
from pipelines.corpus.clustering import embedding
from tests.written_corpus import stdlib_docstrings, write_corpus
from ulm import artefacts
from ulm.recipes.clustering import CorpusClustering

# Ray 2.60 sets deprecated fields of its own whenever it makes a DataContext.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_one_and_two_workers_make_the_clustering_that_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_FIT_DOCUMENTS", 100)
    monkeypatch.setattr(domains, "ITEM_DOCUMENTS", 50)
    texts = [("docs", "test" if n % 9 == 0 else "train", text) for n, text in enumerate(stdlib_docstrings(20))]
    config, found, seen = CorpusClustering(clusters=4), [], []
    for workers in (None, 1, 2):
        corpus = write_corpus(tmp_path / str(workers), texts)
        over = job.over_ray(workers) if workers else map

        def progress(stage: str, done: int, total: int | None, note: str) -> None:
            seen.append((stage, done, total))

        clusters = domains.cluster_after_build(corpus, config, over=over, progress=progress)
        found.append(artefacts.digest_files(clusters.folder))
        assert len(clusters.cluster_N) == len(texts) > 200
        num_others = seen[-1][2]
        assert seen[-1] == ("assign clusters", num_others, num_others) and num_others >= len(texts) - 100
    assert found[0] == found[1] == found[2]
