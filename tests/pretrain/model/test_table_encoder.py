"""The corpus table: counts and PPMI against brute force, planted similarities, and the file it is kept in."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from braid.data_pipeline.corpus import TokenCorpus
from braid.kernels.errors import BraidError, ConfigError, InputError
from braid.pretrain.model import table_encoder
from braid.pretrain.model.table_encoder import (
    TableSettings,
    build_table,
    cooccurrence,
    factorise,
    load_or_build_table,
    positive_pmi,
    stream_chunks,
)

EOS = 9


def stream(num: int = 400, seed: int = 0) -> np.ndarray:
    """Random tokens below 9 in documents of some ten tokens, each closed by EOS."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < 0.1, EOS, rng.integers(0, 8, num))


def brute_force_counts(tokens: np.ndarray, window: int) -> np.ndarray:
    documents, document = [], []
    for token in tokens.tolist():
        document.append(token)
        if token == EOS:
            documents, document = [*documents, document], []
    pairs = Counter()
    for whole in [*documents, document]:
        for i, left in enumerate(whole):
            for right in whole[i + 1 : i + 1 + window]:
                pairs[left, right] += 1
                pairs[right, left] += 1
    counts = np.zeros((10, 10))
    for pair, count in pairs.items():
        counts[pair] = count
    return counts


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("cuts", [[], [200], [1, 2, 3, 50, 52, 399], list(range(1, 400))])
def test_counts_are_symmetric_within_documents_and_whatever_the_pieces(window, cuts):
    tokens = stream()
    counts = cooccurrence(np.split(tokens, cuts), vocab_size=10, window=window, eos_id=EOS).toarray()
    np.testing.assert_array_equal(counts, brute_force_counts(tokens, window))
    assert (counts == counts.T).all() and counts.sum() > 0


def test_ppmi_against_the_definition():
    counts = brute_force_counts(stream(), 2)
    counts[:, 8] = counts[8] = 0
    found = positive_pmi(sparse.csr_matrix(counts)).toarray()
    joint, single = counts / counts.sum(), counts.sum(1) / counts.sum()
    context = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    for i in range(10):
        for j in range(10):
            expected = max(0, np.log(joint[i, j] / (single[i] * context[j]))) if joint[i, j] > 0 else 0
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_factors_are_those_of_the_dense_svd_with_fixed_signs():
    matrix = positive_pmi(sparse.csr_matrix(brute_force_counts(stream(2000), 2)))
    table = factorise(matrix, 4)
    left, singular, _ = np.linalg.svd(matrix.toarray())
    np.testing.assert_allclose(np.abs(table), np.abs(left[:, :4] * np.sqrt(singular[:4])), atol=1e-5)
    assert (table[np.abs(table).argmax(0), np.arange(4)] > 0).all()
    np.testing.assert_array_equal(table, factorise(matrix, 4))


def test_directions_the_counts_do_not_determine_are_zero():
    rank_two = np.zeros((12, 12))
    rank_two[:4, :4], rank_two[4:7, 4:7] = 1.0, 2.0
    table = factorise(sparse.csr_matrix(rank_two), 5)
    assert (np.linalg.norm(table, axis=0)[:2] > 1).all() and not table[:, 2:].any()


def planted_documents(num: int = 300, seed: int = 0) -> tuple[list[str], list[str]]:
    """Documents in which member letters of a class stand between context letters of that class: members of a class
    share their neighbours and never meet. Returns the documents and the classes' members."""
    members, contexts = ["abcde", "fghij", "klmno"], ["ABC", "DEF", "GHI"]
    rng, documents = np.random.default_rng(seed), []
    for _ in range(num):
        chosen = rng.integers(3)
        pairs = zip(rng.choice(list(contexts[chosen]), 12), rng.choice(list(members[chosen]), 12), strict=True)
        documents.append("".join(context + member for context, member in pairs))
    return documents, members


def test_related_tokens_are_nearer_than_others(tmp_path, prepare_documents):
    documents, classes = planted_documents()
    corpus = prepare_documents(tmp_path / "corpus", documents)
    table = load_or_build_table(corpus, latent_dim=6, window=1, vocab_size=259, path="")
    rows = table[[ord(letter) for letters in classes for letter in letters]]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity, same = rows @ rows.T, np.kron(np.eye(3), np.ones((5, 5))).astype(bool)
    np.fill_diagonal(same, False)
    across = np.kron(1 - np.eye(3), np.ones((5, 5))).astype(bool)
    assert similarity[same].min() > 0.9 > 0.5 > similarity[across].max()


@pytest.fixture
def corpus(tmp_path, prepare_documents) -> Path:
    return prepare_documents(tmp_path / "corpus", planted_documents()[0])


def load(corpus: Path, *, latent_dim: int = 4, window: int = 2, path: str | Path = "") -> np.ndarray:
    return load_or_build_table(corpus, latent_dim=latent_dim, window=window, vocab_size=259, path=str(path))


def test_table_is_built_once_and_kept_beside_the_data(corpus, monkeypatch):
    table = load(corpus)
    (file,) = corpus.glob("encoder_table_*.npz")
    other = load(corpus, window=3)
    assert not np.array_equal(table, other) and len(list(corpus.glob("*encoder_table_*"))) == 2
    elsewhere = corpus.parent / "elsewhere"
    elsewhere.mkdir()
    again = load(corpus, path=elsewhere)
    assert file.read_bytes() == (elsewhere / file.name).read_bytes()
    monkeypatch.setattr(table_encoder, "build_table", lambda *_: pytest.fail("the file should have been read"))
    assert np.array_equal(load(corpus), table) and np.array_equal(table, again)
    assert np.array_equal(load(corpus, path=file), table) and np.array_equal(load(corpus, path=elsewhere), table)


def test_table_reads_the_stream_in_pieces_up_to_the_cap(corpus, monkeypatch):
    opened = TokenCorpus.open(corpus, "train")
    whole = opened.read(0, 1000)
    monkeypatch.setattr(table_encoder, "CHUNK_TOKENS", 300)
    chunks = list(stream_chunks(opened, 1000))
    assert [len(chunk) for chunk in chunks] == [300, 300, 300, 100]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    settings = TableSettings(4, 2, 259, opened.fingerprint)
    capped, full = (build_table(stream_chunks(opened, cap), settings, opened.eos_id) for cap in (1000, 10**9))
    assert not np.array_equal(capped, full)


def test_file_of_another_corpus_or_settings_is_refused(corpus, tmp_path, prepare_documents):
    load(corpus, path=tmp_path)
    (file,) = tmp_path.glob("encoder_table_*.npz")
    with pytest.raises(InputError, match="another corpus or other settings"):
        load(corpus, latent_dim=5, path=file)
    other = prepare_documents(tmp_path / "other", planted_documents(seed=1)[0])
    with pytest.raises(InputError, match="another corpus or other settings"):
        load(other, path=file)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"text" * 99])
def test_damaged_file_is_named(corpus, damage):
    load(corpus)
    (file,) = corpus.glob("encoder_table_*.npz")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=rf"no encoder table[\s\S]*{file.name}"):
        load(corpus)


def test_what_cannot_be_built_is_refused(corpus, monkeypatch):
    with pytest.raises(ConfigError, match="as many dimensions as there are tokens"):
        load(corpus, latent_dim=259)
    settings = TableSettings(4, 2, 259, "")
    with pytest.raises(InputError, match="no two tokens"):
        build_table([np.array([256, 256])], settings, eos_id=256)
    with pytest.raises(InputError, match=r"no encoder table[\s\S]*mistyped.npz"):
        load(corpus, path=corpus / "mistyped.npz")
    assert not (corpus / "mistyped.npz").exists()
    monkeypatch.setattr(table_encoder.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(BraidError, match="cannot be written"):
        load(corpus)
    assert not list(corpus.glob(".encoder_table_*")), "no half-written file is left"


def test_processes_that_build_at_once_agree(corpus):
    code = (
        "import sys, xxhash; from pathlib import Path\n"
        "from braid.pretrain.model.table_encoder import load_or_build_table as load\n"
        "assert 'torch' not in sys.modules\n"
        "table = load(Path(sys.argv[1]), latent_dim=4, window=2, vocab_size=259, path='')\n"
        "print(xxhash.xxh3_64_hexdigest(table.tobytes()))"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(corpus)], stdout=subprocess.PIPE) for _ in range(3)]
    assert len({child.communicate()[0] for child in children}) == 1
    assert all(child.returncode == 0 for child in children)
    assert len([file for file in corpus.iterdir() if "encoder_table" in file.name]) == 1
