"""The configuration: one frozen dataclass per YAML section, one docstring per field.

`load.load_config` builds a :class:`Config` from YAML files and `a.b=value` overrides and checks it
with `validate.validate`; nothing else constructs one from user input. The field docstrings are the
`--help` text and the configuration reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 1_000_000.0
    """Base of the rotary frequencies."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Long-context scaling of the frequencies."""
    factor: float = 1.0
    """Context extension factor of the scaling."""
    original_max_position: int = 32768
    """Context length the unscaled model was trained on (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / this are fully scaled."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dimension is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is fully interpolated."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Qwen2/Qwen2.5, Qwen3 and Llama-3 are covered)."""

    init_from: str | None = None
    """Hugging Face directory whose config.json gives this section, where the run does not set max_position_embeddings or rope
    itself, and whose safetensors give the weights."""
    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_hidden_size: int = 704
    """Width of the SwiGLU MLP."""
    num_attention_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads (groups); mha and mqa override it by num_attention_heads and 1."""
    head_dim: int = 64
    """Channels per head."""
    vocab_size: int | None = None
    """Rows of the embedding; null takes the tokenizer's size."""
    vocab_multiple: int = 64
    """The embedding is padded to a multiple of this, itself a multiple of the tensor-parallel size."""
    max_position_embeddings: int = 4096
    """Longest context in tokens that the rotary tables cover."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    qkv_bias: bool = True
    """Bias on the QKV projection (Qwen2.5: true; Qwen3, Llama: false)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    tie_embeddings: bool = True
    """Share the embedding with the output projection."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""


@dataclass(frozen=True)
class MLAConfig:
    """Latent-KV baseline, DeepSeek-V2 shape (ranks and head channels)."""

    q_lora_rank: int | None = None
    """Rank of the query down-projection; null projects queries directly."""
    kv_lora_rank: int = 64
    """Rank of the shared key/value latent."""
    qk_nope_head_dim: int = 64
    """Channels per head without position."""
    qk_rope_head_dim: int = 32
    """Channels of the decoupled rotary key, shared by all heads."""
    v_head_dim: int = 64
    """Value channels per head."""


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention the layers compute."""

    variant: Literal["mha", "mqa", "gqa", "mla", "mka", "fastmka", "blockmka"] = "fastmka"
    """Attention variant; see docs/attention.md."""
    core: Literal["dense", "block"] = "dense"
    """fastmka: attend to every token, or to a window, chunk summaries and recalled chunks (blockmka always does)."""
    block_backend: Literal["auto", "cuda", "flex", "reference"] = "auto"
    """Block core: our CUDA kernels, FlexAttention, or tiles gathered by PyTorch; auto: the kernels on a GPU that has them,
    for what they cover, else flex on CUDA, reference elsewhere."""
    kernels: Literal["auto", "cuda", "reference"] = "auto"
    """Fusion, pooling and recall: our CUDA kernels, or PyTorch; auto: the kernels on a GPU that has them, for what they
    cover."""
    mixture: Literal["output", "score"] = "output"
    """mka: mix the levels' outputs (Algorithm 1) or their scores under one softmax (eq. 5)."""
    fuse: Literal["kv", "k", "v"] = "kv"
    """fastmka: what the route fuses."""
    mla: MLAConfig = field(default_factory=MLAConfig)
    """mla: ranks and head channels."""


@dataclass(frozen=True)
class RoutingConfig:
    """The gate that routes every query over the memory levels."""

    mode: Literal["soft", "fixed", "top1", "top2"] = "soft"
    """soft: learned softmax; fixed: uniform; top1/top2: hard forward, straight-through backward."""
    scope: Literal["token", "group"] = "token"
    """One route per token, or one per token and KV head."""
    gate_input: Literal["q", "x"] = "q"
    """What the gate reads: the raw query (with bias, before norm and RoPE) or the layer input."""
    gate_hidden_size: int = 64
    """Hidden width of the gate MLP (per KV head under scope group)."""
    beta_init: float | None = None
    """Initial blend of the fused levels against the plain tokens; null: 0 after init_from, else 1."""


@dataclass(frozen=True)
class L1Config:
    """L1: the tokens themselves."""

    placement: Literal["hbm"] = "hbm"
    """Where the level lives."""
    window: int | None = None
    """Tokens a query attends to exactly, a multiple of chunk_size; null: the whole context."""
    chunk_size: int = 128
    """Tokens per chunk."""


@dataclass(frozen=True)
class L2Config:
    """L2: the causal session summary."""

    enabled: bool = True
    """Offer the summary to the gate."""
    placement: Literal["hbm"] = "hbm"
    """Where the level lives."""
    summary: Literal["ema", "mean"] = "ema"
    """Exponential moving average, or mean of the document so far."""
    decay: Literal["fixed", "head", "channel"] = "channel"
    """ema: constant decays, or learned ones per KV head or per channel."""
    min_span: float = 2.0
    """ema: shortest initial span in tokens; the decay is 1 - 1/span."""
    max_span: float = 100.0
    """ema: longest initial span; spans are log-spaced over the channels of a head (heads, for head)."""


@dataclass(frozen=True)
class L3Config:
    """L3: long-term memory, chunks recalled by hash."""

    enabled: bool = False
    """Offer recalled chunks to the gate."""
    recalled_chunks: int = 8
    """Chunks recalled per (query chunk, KV head)."""
    selection: Literal["hash", "exact"] = "hash"
    """hash: nearest codes by Hamming distance; exact: largest dot products, the yardstick for it."""
    hash_bits: int = 64
    """Length of a code, a multiple of 64."""
    hash_tables: int = 1
    """Independent codes per chunk; the distance is the smallest over them."""
    hash_seed: int = 0
    """Seed of the planes, which are kept in the checkpoint."""
    placement: Literal["dram", "ssd"] = "dram"
    """Slowest tier of the block core's chunks, those of earlier segments (training.segment_length) and in generation."""
    hbm_pool_gib: float = 0.0
    """Budget in GiB of the hot pages kept on the device."""
    dram_pool_gib: float | None = None
    """Budget in GiB of the (pinned) DRAM pool; null: as much as needed."""
    ssd_pool_gib: float | None = None
    """Budget in GiB of the files in ssd_spill_path; null: the disk's free space."""
    when_full: Literal["stop", "evict"] = "stop"
    """The slowest tier is full: stop the run, or forget the oldest pages."""


@dataclass(frozen=True)
class MemoryConfig:
    """The memory hierarchy: levels, where they live, and the spill path."""

    l1: L1Config = field(default_factory=L1Config)
    """The tokens."""
    l2: L2Config = field(default_factory=L2Config)
    """The session summary."""
    l3: L3Config = field(default_factory=L3Config)
    """Recalled chunks."""
    ssd_spill_path: str | None = None
    """Directory of the L3 SSD tier (l3.placement ssd)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over ranks."""

    tensor_parallel: int = 1
    """Ranks that share each layer's heads and channels."""
    sequence_parallel: bool = False
    """Shard norms and residuals along the sequence over the tensor-parallel ranks."""
    context_parallel: int = 1
    """Ranks that share one sequence."""
    pipeline_parallel: int = 1
    """Pipeline stages (only 1 is supported)."""
    data_parallel: int | None = None
    """Replicas; null: world size / (tensor x context x pipeline)."""


@dataclass(frozen=True)
class SourceConfig:
    """One data source and its share of the blend."""

    path: str
    """text, .jsonl, .parquet file, a directory or glob of them, a Megatron .bin/.idx prefix,
    `hf:<dataset name or directory>[:<config>[:<split>]]` (split: train), or `stdlib` (the Python sources of this
    machine). A text file of a directory or glob is one document (cut after 4 MiB); one named alone is a
    collection, cut at line ends into about 64."""
    weight: float = 1.0
    """Share of the blend, relative to the other sources."""
    text_key: str = "text"
    """Field that holds a document (JSONL, Parquet, hf)."""


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained and evaluated on."""

    train: tuple[SourceConfig, ...] = (SourceConfig("stdlib"),)
    """Training sources."""
    valid: tuple[SourceConfig, ...] = ()
    """Validation sources; empty: held-out documents of the training sources, chosen by hash."""
    valid_fraction: float = 0.02
    """Share of training documents held out when `valid` is empty."""
    format: Literal["pretrain", "sft"] = "pretrain"
    """pretrain: documents; sft: JSONL with `prompt` and `response`, loss on the response only."""
    tokenizer: str | None = None
    """Hugging Face tokenizer directory or name, or a SentencePiece .model; null: a byte-level BPE
    trained on the training documents and kept in cache_dir."""
    tokenizer_vocab_size: int = 4096
    """Vocabulary of the trained byte-level BPE."""
    cache_dir: str = "data_cache"
    """Where tokenised datasets and the trained tokenizer are kept."""
    workers: int = 2
    """Processes that tokenise."""
    sequence_length: int = 512
    """Tokens per training sample; the default is the positions of model.init_from where it has fewer."""
    train_on_prompts: bool = False
    """format sft: the training loss is on the prompts too; the held-out loss stays on the responses."""
    pad_documents_to_chunks: bool = False
    """Start every document, and with format sft every response, on a multiple of memory_hierarchy.l1.chunk_size."""
    reset_at_documents: bool = True
    """Packed documents do not see each other (attention, positions, summaries, labels)."""


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation run."""

    steps: int = 400
    """Optimizer steps."""
    micro_batch_size: int = 8
    """Samples per rank and forward pass."""
    global_batch_size: int = 8
    """Samples per optimizer step over all replicas."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the model; fp16 uses dynamic loss scaling."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    min_learning_rate: float = 2e-4
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning-rate schedule after warm-up (wsd: warm-up, stable, decay)."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    decay_steps: int = 80
    """wsd: length of the final decay in steps."""
    weight_decay: float = 0.1
    """AdamW weight decay (not on biases, norms, decays and blends)."""
    adam_beta1: float = 0.9
    """AdamW first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW second-moment decay."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: nothing, the attention cores, or whole layers."""
    logits_tile: int | None = None
    """Tokens of a rank's micro-batch whose logits are computed at a time, and again in the backward pass; null: all at
    once, kept."""
    mlp_tile: int | None = None
    """Tokens of a rank's micro-batch that go through an MLP at a time, and again in the backward pass; null: all at
    once."""
    seed: int = 1234
    """Seed of initial weights and data order."""
    deterministic: bool = False
    """Refuse nondeterministic kernels."""
    eval_interval: int = 50
    """Steps between evaluations; 0: only at the end."""
    eval_batches: int = 16
    """Global batches per evaluation; 0: the whole validation set."""
    output_dir: str = "runs/default"
    """Where checkpoints, TensorBoard events and metrics.json go."""
    save_interval: int = 100
    """Steps between checkpoints; 0: only at the end and on a signal."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed once a newer one is published."""
    async_save: bool = False
    """Go on training while a thread writes the checkpoint, from one copy of the rank's files in host memory."""
    segment_length: int | None = None
    """Block core: slots of a sample processed at a time, a multiple of chunk_size; earlier segments are seen
    through their summaries and recalled chunks, without gradient. null: the whole sample at once."""
    segments_per_step: int | None = None
    """Segments per optimizer step; null: all of a sample."""
    resume: str = "auto"
    """auto: newest intact checkpoint of output_dir, if any; none: start fresh in an empty output_dir;
    or the path of a checkpoint to begin at, from which the same command goes on with those in output_dir."""
    max_bad_steps: int = 3
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states live (ZeRO >= 1; nvme: ZeRO-3)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters live between uses (ZeRO-3)."""
    nvme_path: str | None = None
    """Directory for nvme offload."""
    initial_loss_scale_power: int = 16
    """fp16: the first loss scale is 2 to this power."""
    deepspeed_config: str | None = None
    """Path of a DeepSpeed JSON merged over ours; a key that contradicts this file is refused."""
    timeout_seconds: int = 1800
    """Seconds without progress of any rank (a pass over a micro-batch, an evaluation batch, a checkpoint) after which the
    run ends with exit code 1 and every rank's stack traces in output_dir/hangs; a collective may take twice as long."""


@dataclass(frozen=True)
class LoggingConfig:
    """Progress, TensorBoard and profiles."""

    interval: int = 10
    """Steps between log lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""
    progress: bool = True
    """Progress bar on rank 0."""
    profile_steps: tuple[int, ...] = ()
    """Steps traced by torch.profiler into output_dir/profile."""
    memory_snapshot_steps: tuple[int, ...] = ()
    """Steps after which a CUDA memory snapshot is written to output_dir/profile."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the transformer."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Which attention the layers compute."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """The gate over the memory levels."""
    memory_hierarchy: MemoryConfig = field(default_factory=MemoryConfig)
    """The memory levels and where they live."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources, tokenizer and packing."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Optimisation, evaluation and checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Progress, TensorBoard and profiles."""
