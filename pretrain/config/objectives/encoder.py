"""Settings of the frozen encoder of joint models."""

from __future__ import annotations

from dataclasses import dataclass

from braid.pretrain.config.check import Check

KINDS = ("table", "random", "embeddings", "huggingface", "trained")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen encoder whose per-token representations are the continuous strand."""

    kind: str = "table"
    """`table` (built from the training corpus: PPMI and truncated SVD), `random` (control: a fixed Gaussian table),
    `embeddings` (control: the token embeddings another run on this tokenizer has learnt, as a fixed table),
    `huggingface` (a frozen pretrained encoder that shares the corpus's tokenizer) or `trained` (the encoder of a run
    with `objective.name=t5` on this tokenizer, every channel normalised over training text)."""
    path: str = ""
    """For `huggingface`: local folder or hub name. For `trained` and `embeddings`: run directory or checkpoint. For
    `table`: the table's file, or a folder (empty: the data folder) that has, or after the first use will have, one
    named by its settings."""
    latent_dim: int = 32
    """Dimensions kept of each representation (the first ones)."""
    layer: int = -1
    """For `huggingface`: which hidden state; 0 is the embeddings, -1 the last."""
    random_weights: bool = False
    """For `huggingface`, a control: the architecture and tokenizer of `path`, weights drawn at random from the seed."""
    window: int = 4
    """For `table`: co-occurrences are counted up to this many tokens apart."""
    variance_floor: float = 1e-6
    """Added to the variance when a representation is standardised over its dimensions."""


def check_encoder(check: Check, encoder: EncoderConfig) -> None:
    """What is wrong with the encoder's settings."""
    kind, path = encoder.kind, "objective.encoder"
    check.one_of(f"{path}.kind", kind, KINDS)
    check.at_least(f"{path}.latent_dim", encoder.latent_dim, 1)
    check.at_least(f"{path}.window", encoder.window, 1)
    check.positive(f"{path}.variance_floor", encoder.variance_floor)
    if kind == "huggingface" and not encoder.path:
        check.add(f"{path}.kind = 'huggingface' needs a model", change=f"{path}.path=FOLDER or a hub name")
    if kind == "trained" and not encoder.path:
        check.add(f"{path}.kind = 'trained' needs a model", change=f"{path}.path=RUN, trained with objective.name=t5")
    if kind == "embeddings" and not encoder.path:
        check.add(f"{path}.kind = 'embeddings' needs a model", change=f"{path}.path=RUN, trained on this tokenizer")
    if kind in KINDS and kind != "table" and encoder.window != EncoderConfig.window:
        found = f"{path}.window = {encoder.window} and {path}.kind = {kind!r}"
        check.add(f"{path}.window is ignored: only a table counts what is near", found,
                  f"{path}.window={EncoderConfig.window}")  # fmt: skip
    if kind == "random" and encoder.path:
        check.add(f"{path}.path = {encoder.path!r} is ignored: kind = 'random' reads no file", change=f"{path}.path=")
    if kind != "huggingface" and encoder.layer != -1:
        found = f"{path}.layer = {encoder.layer} and {path}.kind = {kind!r}"
        check.add(f"{path}.layer is ignored: only a huggingface encoder has layers", found, f"{path}.layer=-1")
    if kind != "huggingface" and encoder.random_weights:
        check.add(
            f"{path}.random_weights is ignored: only a huggingface encoder has weights",
            found=f"{path}.random_weights = true and {path}.kind = {kind!r}",
            change=f"{path}.random_weights=false",
        )
