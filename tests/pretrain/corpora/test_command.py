"""`braid data` as its users meet it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare
from braid.launch.cli import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lengths = [7, 100, 100, 2500, 40, 333, 12, 12, 900]
    texts = [("word " * n)[:n] for n in lengths * 12]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "texts.jsonl"], "bytes", folder / "corpus", shard_bytes=20_000, row_tokens=512, progress=False)
    return folder / "corpus"


@pytest.fixture
def braid(capsys):
    """`braid("data", "verify", ...)` in this process: exit code, output and what it complained of."""

    def run(*words) -> tuple[int, str, str]:
        code = main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_inspect(braid, corpus, tmp_path):
    page = tmp_path / "corpus.html"
    code, out, err = braid("data", "inspect", corpus, "--json", "--report", page)
    assert code == 0, err
    text, _, written = out.rpartition("}\n")
    assert str(page) in written
    facts = json.loads(text + "}")
    manifest = json.loads((corpus / "manifest.json").read_text())
    for name, split in facts["splits"].items():
        stored, lengths = manifest["splits"][name], split["lengths"]
        assert (split["documents"], split["tokens"], split["fingerprint"]) == (
            stored["documents"], stored["tokens"], stored["fingerprint"],
        )  # fmt: skip
        assert sum(lengths["histogram"]["documents"]) == lengths["documents"] == stored["documents"]
        assert sum(lengths["histogram"]["tokens"]) == stored["tokens"]
        assert lengths["mean"] == pytest.approx(stored["tokens"] / stored["documents"])
    assert facts["splits"]["train"]["lengths"]["quantiles"]["longest"] == 2500
    assert facts["splits"]["train"]["lengths"]["quantiles"]["shortest"] == 7

    html = page.read_text()
    HTMLParser().feed(html)
    assert html.count("<svg") >= 2 and "Documents by length" in html and facts["tokenizer"]["hash"] in html
    assert "NaN" not in html and "http" not in re.sub(r"<meta [^>]*>", "", html)
    _, words, _ = braid("data", "inspect", corpus)
    assert "of all documents" in words and facts["splits"]["train"]["fingerprint"] in words


def test_sample_shows_what_training_sees(run_braid, corpus):
    done = run_braid("data", "sample", corpus, "--rows", 3, "--sequence-length", 32, "--seed", 5)
    assert done.returncode == 0, done.stderr
    shown = re.split(r"^-- position \d, row (\d+) of 1,\d+$\n", done.stdout, flags=re.MULTILINE)[1:]
    rows = Rows(TokenCorpus.open(corpus, "train"), 32, "wrap")
    wanted = ShuffledOrder(rows.rows_per_shard, 5, 4).span(0, 3).tolist()
    assert list(map(int, shown[::2])) == wanted
    for row, text in zip(wanted, shown[1::2], strict=True):
        inner = rows.corpus.tokenizer.decode(rows[row])
        assert re.sub("<bos/eos>", "", text.strip("\n")).replace(" x 2 ", "") == inner


@pytest.mark.parametrize("packing", ["document", "best_fit", "paragraph"])
def test_sample_shows_no_padding(braid, corpus, tmp_path, packing):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    _, shown, _ = braid("data", "sample", copy, "--rows", 20, "--sequence-length", 256, "--packing", packing)
    rows = Rows(TokenCorpus.open(copy, "train"), 256, packing)
    order = ShuffledOrder(rows.rows_per_shard, 0, 4).span(0, 20)
    lines = [line for line in shown.split("\n") if line.startswith("-- position")]
    assert lines == [f"-- position {n}, row {row} of {len(rows):,}" for n, row in enumerate(order)]
    assert "pad" not in shown and rows.num_real(order) < 20 * 256


def test_verify(braid, corpus, tmp_path):
    copy = tmp_path / "copy"
    for file in corpus.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(corpus)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    code, out, err = braid("data", "verify", copy)
    assert code == 0 and "all whole" in out, err
    shard = sorted(copy.glob("train/*.mds"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    code, out, err = braid("data", "verify", copy)
    assert code == 2 and f"train/{shard.name}" in err and "hash" in out
    code, out, _ = braid("data", "inspect", copy)  # says what can be said
    assert code == 0 and re.search(r"documents in \d+ of \d+ shards", out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "nowhere"], "not a prepared corpus"),
        (["verify", "nowhere"], "not a prepared corpus"),
        (["sample", "CORPUS", "--rows", "0"], "impossible rows"),
        (["sample", "CORPUS", "--packing", "pairs"], "does not consist of pairs"),
        (["inspect", "CORPUS", "--report", "nowhere/page.html"], "does not exist"),
    ],
)
def test_careless_use(braid, corpus, words, said):
    code, _, err = braid("data", *[corpus if word == "CORPUS" else word for word in words])
    assert code == 2 and said in err
