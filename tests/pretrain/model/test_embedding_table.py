"""A run's token embeddings as the frozen table of another: trained by the real command, then read from its run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import BraidError, CheckpointError, ConfigError, InputError
from braid.pretrain.checkpoint.snapshot import load_model
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.encoders import TableEncoder, build_encoder
from braid.pretrain.planning.network import frozen_encoder_bytes

DIM, WIDTH = 6, 16
CPU = torch.device("cpu")
SIZE = [f"model.width={WIDTH}", "model.num_heads=2", "data.sequence_length=16", "run.device=cpu"]


@pytest.fixture(scope="module")
def corpus(prepare_documents, tmp_path_factory) -> Path:
    documents = [f"Document {i}: " + "the quick brown fox jumps over the lazy dog. " * (1 + i % 5) for i in range(60)]
    return prepare_documents(tmp_path_factory.mktemp("corpora") / "corpus", documents)


def braid(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "braid.launch.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True)


def train(recipe: str, run_dir: Path, corpus: Path, *options: str) -> Path:
    done = braid("pretrain", recipe, f"data.path={corpus}", f"run.dir={run_dir}", *SIZE, *options, cwd=corpus)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return train("tiny_mdlm", tmp_path_factory.mktemp("runs") / "mdlm", corpus)


def encoder(path: Path | str, corpus: Path, **options) -> TableEncoder:
    config = EncoderConfig(kind="embeddings", path=str(path), **({"latent_dim": DIM} | options))
    ids = {name: getattr(load_tokenizer(corpus / "tokenizer"), name) for name in ("vocab_size", "mask_id")}
    return build_encoder(config, corpus_folder=corpus, key=0, **ids)


def test_rows_are_the_averaged_embeddings_standardised(run, corpus):
    model = load_model(run, CPU)
    learnt = model.objective.network.token_embedding.weight.detach().double()[:, :DIM]
    expected = (learnt - learnt.mean(1, keepdim=True)) / learnt.std(1, keepdim=True, correction=0)
    found = encoder(run, corpus)
    torch.testing.assert_close(found.table.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.num_parameters == len(learnt) * DIM and not found.table.requires_grad
    raw = load_model(run, CPU, use_ema=False).objective.network.token_embedding.weight
    assert not torch.allclose(raw[:, :DIM].double(), learnt, atol=1e-5), "the averaged ones differ from the last"


def test_what_is_hidden_is_not_seen(run, corpus):
    table, tokens = encoder(run, corpus), torch.arange(12)[None] + 97
    hidden = torch.arange(12)[None] % 3 == 0
    z = table.encode(tokens, hidden)
    assert torch.equal(z, table.encode(torch.where(hidden, tokens + 1, tokens), hidden)) and not z[hidden].any()


def test_a_model_on_it_needs_the_run_to_train_and_its_checkpoint_alone_afterwards(run, corpus, tmp_path):
    """The table is in the checkpoint, as any table is; who trains on reads the run again, and finds out if it moved."""
    shutil.copytree(run, tmp_path / "source")
    options = [f"objective.encoder.path={tmp_path / 'source'}", "objective.encoder.kind=embeddings",
               f"objective.encoder.latent_dim={DIM}"]  # fmt: skip
    joint = train("tiny_ccdd", tmp_path / "joint", corpus, *options)
    shutil.move(tmp_path / "source", tmp_path / "gone")
    model = load_model(joint, CPU)
    assert torch.equal(model.objective.encoder.table, encoder(run, corpus).table)
    scored = braid("evaluate", joint, "--sequences", 4, "--draws", 1, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr

    again = ["pretrain", "tiny_ccdd", f"data.path={corpus}", f"run.dir={joint}", *SIZE, *options, "training.steps=25"]
    assert braid(*again, cwd=tmp_path).returncode == 2
    train("tiny_mdlm", tmp_path / "source", corpus, "run.seed=1")
    moved = braid(*again, cwd=tmp_path)
    assert moved.returncode == 2 and "encoder_fingerprint" in moved.stderr


@pytest.mark.parametrize("recipe", ["tiny_replaid", "tiny_t5", "tiny_ar"])
def test_every_system_with_embeddings_serves(recipe, corpus, tmp_path):
    found = encoder(train(recipe, tmp_path / "run", corpus, "training.steps=2", "optimizer.warmup_steps=1"), corpus)
    assert found.table.shape == (load_tokenizer(corpus / "tokenizer").vocab_size, DIM)
    torch.testing.assert_close(found.table.square().sum(1), torch.full((len(found.table),), float(DIM)))


def test_what_does_not_fit_is_refused(run, corpus, tmp_path, prepare_documents):
    def error(path, corpus=corpus, **options) -> BraidError:
        with pytest.raises(BraidError) as raised:
            encoder(path, corpus, **options)
        return raised.value

    assert isinstance(error(""), ConfigError)
    assert isinstance(error(tmp_path / "nowhere"), CheckpointError)
    wide = error(run, latent_dim=WIDTH + 1)
    assert isinstance(wide, ConfigError) and "narrower than the latents" in str(wide)
    other = prepare_documents(tmp_path / "other", ["a b c"] * 30, "train:300")
    assert isinstance(error(run, other), InputError) and "tokenizer is not the corpus's" in str(error(run, other))
    elf = train("tiny_elf", tmp_path / "elf", corpus, "training.steps=2", "optimizer.warmup_steps=1")
    assert "embeds no tokens" in str(error(elf))


def test_the_plan_counts_the_table():
    from braid.pretrain.config.load import load_config

    config = load_config("tiny_ccdd", ["objective.encoder.kind=embeddings", "objective.encoder.path=runs/other"])
    assert frozen_encoder_bytes(config, 100) == 4 * 100 * 8
