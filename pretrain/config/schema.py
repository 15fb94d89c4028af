"""The configuration of a run: frozen dataclasses, one docstring under every field (shown by `braid pretrain --help`).

No torch, no I/O, no device here: a configuration is data. `load.py` reads recipes and overrides into these classes,
`validate.py` says everything that is wrong with one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.accelerators import AcceleratorsConfig
from braid.pretrain.config.objectives import ObjectiveConfig
from braid.pretrain.config.objectives.mdlm import MDLMConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it runs on."""

    dir: str = "runs/default"
    """Run directory: configuration, metrics, checkpoints, samples and report all go below it."""
    seed: int = 0
    """Key of every random draw: order of the data, initialisation, times, masks and noise."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cpu` or `cuda`."""
    precision: str = "fp32"
    """`fp32`, or `bf16` (autocast; weights, loss, times and schedules stay float32 or better)."""
    deterministic: bool = True
    """Use torch's deterministic algorithms, so that a resumed run continues bit for bit."""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice. Bitwise resume needs the same number."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """From some sample of the run on, the sources of a mixture have other weights."""

    from_sample: int
    """The first sample of the stage, counted from 0 over the whole run: steps x training.global_batch_size."""
    weights: dict[str, float]
    """As data.weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared corpus (see `braid prepare`) or several of them, and how rows are cut from them."""

    path: str = "data/embedded"
    """Folder written by `braid prepare`; it holds `train/`, `validation/` and `tokenizer/`. Or the URL of a copy in a
    store: s3://, gs://, hf://, http://, https://, file://. Its shards are fetched before they are read."""
    sources: dict[str, str] = field(default_factory=dict)
    """A mixture of corpora in place of `path`: name -> folder or URL, all prepared with the same tokenizer. Each sample
    comes from one source, and each source gives every row once per epoch of its own. An encoder that is made from the
    corpus is made from the first. `data.sources.web=data/web` adds or replaces one."""
    weights: dict[str, float] = field(default_factory=dict)
    """How the sources share the samples: name -> any number from 0. Samples are dealt exactly: after n of them each
    source has given its share to within one at the end of a block (of 256, or more where a share is smaller). None:
    in proportion to the rows of the sources, so that their epochs end together. Where a run is resumed with other
    weights, a new stage begins there."""
    temperature: float = 1.0
    """Shares are proportional to weight^(1/T), of the weights given or of the numbers of rows, in every stage: above
    1 the small sources give more."""
    stages: tuple[StageConfig, ...] = ()
    """A curriculum: later weights, in order, for example `[{from_sample: 100000, weights: {web: 1, code: 3}}]`."""
    sequence_length: int = 128
    """Tokens in a row, special tokens included."""
    packing: str = "wrap"
    """`wrap`: BOS + L-2 tokens of the stream + EOS (the MDLM and Duo convention); `stream`: L tokens of the stream;
    `pairs`: one (source, target) pair of a corpus prepared with `--pairs`, the source given and the target learnt.
    The stream is the documents one after the other, each followed by EOS. `document`: BOS + one document + EOS;
    `best_fit`: as many of those as fit, none of which sees another; `paragraph`: ELF's, one paragraph after the other
    and an EOS where the next does not fit. The last three pad their rows; padding is neither scored nor seen."""
    oversized: str = "auto"
    """A document, paragraph or pair that does not fit a row: `cut` it into pieces (a pair: at the end of its source and
    of its target), `skip` it (counted), or `stop` with an error; `auto` cuts all but pairs, which stop."""
    target_tokens: int = 0
    """Of a pair that is cut: the most tokens its target keeps (EOS included) where its source needs the rest of the
    row; 0: half the row."""
    window: int = 4
    """Shards shuffled together: larger mixes better, smaller reads fewer shards at a time."""
    workers: int = 0
    """Loader processes per rank; 0 reads in the training process (fastest for local files)."""
    damaged: str = "stop"
    """A damaged or missing shard: `stop` with its name, or `skip` its rows and write them into a ledger."""
    cache: str = ""
    """Where shards of a URL are kept, for all processes of this machine: a folder on a local disk. Empty:
    $XDG_CACHE_HOME/braid/corpora, or ~/.cache/braid/corpora."""
    cache_gb: float = 100.0
    """Gigabytes (10^9 bytes) of shards kept there; beyond, those opened longest ago go, unless somebody reads them.
    0: no limit."""
    retries: int = 5
    """Attempts after the first to fetch a file of a URL, with growing pauses in between."""
    timeout_s: float = 300.0
    """Seconds to fetch one, all attempts together; an attempt that is silent for its share of them is given up."""

    @property
    def folders(self) -> list[str]:
        """The corpora of the run."""
        return list(self.sources.values()) or [self.path]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer (DiT) all objectives share; defaults are the field's "small" size."""

    width: int = 768
    """Hidden width d."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads; the head dimension is width / num_heads and must be even (RoPE)."""
    mlp_ratio: float = 4.0
    """Width of the MLP over the width of the model."""
    cond_dim: int = 128
    """Width of the time conditioning that drives adaLN."""
    dropout: float = 0.0
    """Dropout probability in the blocks (after attention and MLP); attention weights are never dropped."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    z_loss: float = 0.0
    """In training each cross-entropy of a token gets this times log(sum of exp(logits))^2 more, with its weight, which
    keeps the logits from drifting (PaLM, arXiv 2204.02311, with 1e-4). The training loss that is reported has it,
    validation and bounds do not."""
    activation_checkpointing: str = "none"
    """`none`, or `block`: keep only the input of each block and recompute the rest in the backward pass."""
    compile: bool = False
    """Compile the blocks with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: str = "adamw"
    """`adamw`, or `muon` (orthogonalised momentum for matrices, Nesterov-Adam at the same rate for all else)."""
    lr: float = 3e-4
    """Peak learning rate."""
    momentum: float = 0.95
    """Momentum of the matrices, for `muon`."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; embeddings, biases, norms and vectors are never decayed."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: str = "constant"
    """After warm-up: `constant`, `cosine` (to min_lr_ratio at the last step) or `wsd` (constant, then linear decay)."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """For `wsd`: length of the final decay in steps."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak, for `cosine` and `wsd`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the run, batch and what happens along the way."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 512
    """Sequences per optimizer step over all ranks and micro-batches."""
    micro_batch_size: int = 32
    """Sequences per forward pass on one rank; the rest of the global batch is accumulated."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights; 0 keeps none."""
    log_every: int = 10
    """Steps between progress lines."""
    validate_every: int = 0
    """Steps between validations; 0 validates at the end only."""
    validation_sequences: int = 256
    """Validation sequences used during training, spread over the split; in a mixture shared by its weights, two of a
    source at least. The final number comes from `braid evaluate`."""
    sample_every: int = 0
    """Steps between samples drawn during training; 0 draws none."""
    num_samples: int = 4
    """Samples drawn each time."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to continue from."""

    every: int = 0
    """Steps between checkpoints; 0 saves at the end (and on a signal) only."""
    keep: int = 2
    """Newest checkpoints kept; older ones are removed once a newer one is verified. 0 keeps all."""
    asynchronous: bool = True
    """Train on while a checkpoint is written. It costs host memory: weights, moments and averages once more, 16 bytes a
    parameter with AdamW, shared by all ranks; a save that does not fit is made while training waits, a few tensors at a
    time."""
    resume: str = "auto"
    """`auto` (go on from the newest valid checkpoint of this run, if any) or `never` (refuse to reuse the folder)."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Default sampler of `braid sample` and of samples drawn while training."""

    steps: int = 64
    """Denoising steps T. Network calls are counted and printed."""
    sampler: str = ""
    """How a step is made; empty is the objective's default. `ccdd`: ddim, ddpm or joint_nelbo; `replaid`: ddpm, ddim,
    dpm2m or heun; `co_ladd`: joint, joint_ddpm, joint_nelbo, sequential, sequential_ddpm or sequential_nelbo;
    `di_ladd`: joint or sequential; `elf`: sde, sde_paper, sde_marginal or ode; the others have one. A sampler named as
    a bound is the one which that is about: latents spread by objective.latent_sigma around what the encoder says."""
    guidance: float = 1.0
    """`ccdd`: weight w of classifier-free guidance by the latents; 1 is none and costs one call a step, otherwise two.
    `elf`: the scale the network is told (trained in, no second call)."""
    temperature: float = 1.0
    """Temperature of the token distribution."""
    top_p: float = 1.0
    """Nucleus: keep the smallest set of tokens with at least this mass; 1 keeps all."""
    greedy_final: bool = False
    """`mdlm`, `duo`, `gidd`, `ccdd`, `co_ladd`, `di_ladd`: the last step takes the most probable tokens instead of
    drawing them. (MDLM's release does so with what its last draw, at t = 1e-5, leaves masked: next to nothing.)"""
    draw_final: bool = False
    """`elf`: the decoder's tokens are drawn at temperature 1 too, where the most probable ones are taken (published);
    another temperature, or a nucleus below 1, draws in any case."""
    score_temperature: float = 1.0
    """`replaid`: divides the predicted noise; below 1 the samples are sharper."""
    token_guidance: float = 0.0
    """`replaid`: weight of the gradient of the known tokens' log-probability; 0 pins known positions instead."""
    latent_steps: int = 0
    """`co_ladd`, `di_ladd`, sequential samplers: steps that draw the latents before the tokens; 0 takes `steps`."""
    noise_scale: float = 1.0
    """`elf`: gamma of the SDE samplers, how much noise each step puts back."""
    grid: str = "quantiles"
    """`elf`: flow times of the steps: `quantiles` of the training times, sorted `random` draws of them (the released
    code), or `uniform`. The first two are better in few steps, by the paper, and narrow what is sampled: with an exact
    denoiser of N(0, 1) the ODE's standard deviation is 0.53, 0.68 and 0.79 in 64, 256 and 1024 steps on quantiles, and
    0.96, 0.97 and 0.98 on the uniform grid."""
    input_guidance: float = 1.0
    """`elf` on (source, target) pairs: weight of guidance by the source; 1 is none, otherwise two calls a step."""


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Sinks beside metrics.jsonl, which is always written first."""

    wandb: str = "off"
    """`off`, `online` or `offline`. The run id is kept in the run directory, so a resumed run continues its curve."""
    wandb_project: str = "braid"
    """W&B project."""
    wandb_name: str = ""
    """W&B run name; empty takes the run directory's name."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about a run. Saved resolved as `config.yaml` in the run directory; that file is itself a recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it eats."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    objective: ObjectiveConfig = field(default_factory=MDLMConfig)
    """What is learnt; `objective.name` chooses the class and so the fields."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is learnt."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Over which processes it is spread."""
    accelerators: AcceleratorsConfig = field(default_factory=AcceleratorsConfig)
    """Whose kernels compute it."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How samples are drawn."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Who else is told."""
