"""The table of the engine's settings: what each means, its default, and which values it takes.

Grouped as `--help` and docs/flags.md show them. `ServerArgs` (server_args.py) is this table, checked.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vibe_sgl_lite.runtime.settings.address import check_address, check_name, split_host_port
from vibe_sgl_lite.runtime.settings.schema import Spec

MODEL, PARALLELISM, MEMORY, DAEMON, HTTP, INSIDE = (
    "Model", "Parallelism", "Memory and scheduling", "Daemon", "HTTP", "Looking inside"
)  # fmt: skip
MAX_RANKS = 1024


class Flags(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """All settings of one engine. Flags are the fields' names with dashes."""

    # fmt: off
    model_path: Annotated[str, Spec(
        "folder with `config.json`, `tokenizer.json` and `*.safetensors`; or a hub id such as `Qwen/Qwen3-0.6B`, "
        "downloaded on first use; or `embedded`, the small model inside this package",
        "Only JSON, template and safetensors files are downloaded.",
        group=MODEL, path=True, aliases=("model",), like=("m",),
    )] = "embedded"
    revision: Annotated[str | None, Spec(
        "branch, tag or commit of the model's hub id",
        unset="the newest", group=MODEL, chars=200,
    )] = None
    tokenizer_path: Annotated[str | None, Spec(
        "folder or hub id of the tokenizer, where it is not the model's own",
        unset="the model's folder", group=MODEL, path=True, aliases=("tokenizer",),
    )] = None
    load_format: Annotated[str, Spec(
        "`auto` reads the checkpoint; `dummy` makes seeded random weights from `config.json` alone",
        "That is to measure speed without a checkpoint.",
        group=MODEL, choices=("auto", "dummy"),
    )] = "auto"
    weight_version: Annotated[str, Spec(
        "what answers call the weights of the start, until others take their place",
        group=MODEL, chars=256,
    )] = "default"
    dtype: Annotated[str, Spec(
        "number format of weights and activations: `auto` is the checkpoint's own, else `float32`, `bfloat16` or "
        "`float16`",
        group=MODEL, choices=("auto", "float32", "bfloat16", "float16"), aliases=("torch_dtype",),
        values=(
            ("half", "float16"), ("float", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"),
        ),
    )] = "auto"
    quantization: Annotated[str, Spec(
        "keep matrices in fewer bits than `none`, made while loading. On a CPU: `int8` (with activations in 8 bits "
        "too) is faster at any batch size, `int4` (weights only) the fastest for one request. On a GPU: `int4`, for "
        "dense models, and `fp8` (e4m3, with activations too)",
        "`int8`: weights with a scale an output, activations with a scale a row; answers close to those of `none`. "
        "`int4`: in groups of 32, on a GPU of 128; the least memory, with a visible loss. `fp8`: scales as `int8`; for "
        "dense models in bfloat16. Norms and MoE routers keep their format, and so does the embedding; beside `int4` "
        "on a CPU that is in int8.",
        group=MODEL, choices=("none", "int8", "int4", "fp8"),
        allowed="the form of a checkpoint (FP8, AWQ, GPTQ) is found by itself",
    )] = "none"
    kv_cache_dtype: Annotated[str, Spec(
        "number format of the KV cache; `auto` is the model's. `int8`, with a scale a token and head: the same memory "
        "holds almost twice the tokens of bfloat16, and the answers are almost the same. `fp8` (e4m3), on a GPU: as "
        "large, and further from them",
        "Values are rounded once, as they are stored, and long contexts decode faster. A token takes 2 x layers x "
        "KV heads x (head_dim + 4) bytes: at head_dim 128, 51.6 % of bfloat16 (Qwen3-0.6B: 59,136 in place of "
        "114,688 bytes).",
        group=MODEL, choices=("auto", "int8", "fp8"), values=(("fp8_e4m3", "fp8"),),
        like=("cache_type_k", "cache_type_v"),
    )] = "auto"
    device: Annotated[str, Spec(
        "where the model runs: `auto` is `cuda` where a GPU that `CUDA_VISIBLE_DEVICES` does not hide and a torch "
        "built for it are found, else `cpu`",
        group=MODEL, choices=("auto", "cpu", "cuda"),
        like=("n_gpu_layers", "gpu_layers", "num_gpu", "device_map", "ngl"),
    )] = "auto"
    tp: Annotated[int, Spec(
        "tensor parallelism: over how many ranks each layer is split",
        "Must divide the model's heads; KV heads are split, or replicated when there are fewer of "
        "them than ranks. An impossible number is refused with the possible ones.",
        group=PARALLELISM, unit="ranks", low=1, high=MAX_RANKS, aliases=("tensor_parallel_size", "tp_size"),
    )] = 1
    ep: Annotated[int, Spec(
        "expert parallelism of MoE models: over how many of the `--tp` ranks the experts are split; each expert is "
        "split over the tp / ep ranks that share it",
        "It divides `--tp`. `--tp 4 --ep 4`: whole experts, a quarter of them a rank; `--tp 4 --ep 2`: half of the "
        "experts, halved.",
        group=PARALLELISM, unit="ranks", low=1, high=MAX_RANKS, aliases=("ep_size", "expert_parallel_size"),
        like=("enable_expert_parallel",),
    )] = 1
    moe_dispatch: Annotated[str, Spec(
        "how tokens meet their experts: `all-reduce` adds up what each rank's experts make of all tokens, "
        "`all-to-all` sends each token only to the ranks whose experts it chose",
        "`all-reduce` is one collective a layer, best for few ranks.",
        group=PARALLELISM, choices=("all-reduce", "all-to-all"),
    )] = "all-reduce"
    nnodes: Annotated[int, Spec(
        "machines that share the ranks, tp / nnodes each; the same command runs on all of them, with its own "
        "`--node-rank`. The network between them must be isolated: nothing on it is authenticated",
        "See [several nodes](#several-nodes).",
        group=PARALLELISM, unit="nodes", low=1, high=MAX_RANKS,
    )] = 1
    node_rank: Annotated[int, Spec(
        "which of the nodes this is: 0 serves clients, the others only host ranks",
        group=PARALLELISM, low=0, high=MAX_RANKS - 1,
    )] = 0
    dist_init_addr: Annotated[str | None, Spec(
        "`HOST:PORT` of node 0 where the ranks of all nodes meet, the same on every node",
        unset="none is needed on one machine", group=PARALLELISM, check=split_host_port,
        aliases=("nccl_init_addr",),
    )] = None
    rejoin_timeout: Annotated[float, Spec(
        "how long the nodes wait for one that was lost, or for the network; then the engine ends",
        "Requests wait meanwhile. A node that was started again with the same command joins as the lost one.",
        unit="seconds", group=PARALLELISM, low=1, high=864_000,
    )] = 300.0
    name: Annotated[str, Spec(
        "name of this daemon, under which clients find it; several daemons can run side by side",
        group=DAEMON, check=check_name,
    )] = "default"
    address: Annotated[str | None, Spec(
        "where clients connect: `ipc://PATH` or `tcp://127.0.0.1:PORT`; port 0 picks a free one, which the ready "
        "line tells",
        "Beyond loopback only with `--server-key` and `--client-keys`. Without these, every user of this machine can "
        "connect to a tcp:// address. See [security](security.md).",
        unset="an ipc socket in the private run directory, under `--name`", group=DAEMON,
    )] = None
    server_key: Annotated[str | None, Spec(
        "file with the engine's own keys, made by `vibe-sgl-lite keygen FILE`",
        unset="clients are not asked for keys", group=DAEMON, path=True,
    )] = None
    client_keys: Annotated[str | None, Spec(
        "file with a client's public key a line: who may connect to a tcp:// `--address`; changes count at once",
        "Connections are encrypted then (CURVE).",
        unset="clients are not asked for keys", group=DAEMON, path=True,
    )] = None
    no_http: Annotated[bool, Spec(
        "start no HTTP server: only clients of this library can connect",
        "`LLM` never starts one.",
        group=HTTP,
    )] = False
    host: Annotated[str, Spec(
        "address that the HTTP server listens on; beyond loopback only with `--api-key` or `--insecure`",
        "See [HTTP](http.md).",
        group=HTTP,
    )] = "127.0.0.1"
    port: Annotated[int, Spec(
        "port of the HTTP server; 0 picks a free one, which the ready line tells",
        group=HTTP, low=0, high=65535,
    )] = 30000
    http_workers: Annotated[int, Spec(
        "processes that share the HTTP port",
        group=HTTP, unit="processes", low=1, high=64, like=("api_server_count",),
    )] = 1
    api_key: Annotated[str | None, Spec(
        "secret that every HTTP request must bring, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
        group=HTTP, unset="none is asked for",
    )] = None
    insecure: Annotated[bool, Spec(
        "let the HTTP server listen beyond loopback without an API key",
        "Anybody who reaches it can use the engine.",
        group=HTTP,
    )] = False
    ssl_certfile: Annotated[str | None, Spec(
        "PEM file of the certificate chain; then HTTPS is served in place of HTTP",
        group=HTTP, unset="HTTP", path=True, aliases=("ssl_cert_file",),
    )] = None
    ssl_keyfile: Annotated[str | None, Spec(
        "PEM file of the certificate's key",
        group=HTTP, unset="it is in `--ssl-certfile`", path=True, aliases=("ssl_key_file",),
    )] = None
    cors_origin: Annotated[str | None, Spec(
        "web origin whose pages may call the HTTP server, such as `https://chat.example.org`",
        group=HTTP, unset="its own page alone", like=("allowed_origins", "cors_origins"),
    )] = None
    served_model_name: Annotated[str | None, Spec(
        "the model's name for HTTP clients",
        group=HTTP, unset="the model's own", like=("alias",),
    )] = None
    metrics_prefix: Annotated[str, Spec(
        "what the names on `/metrics` begin with, where they are those of vLLM",
        group=HTTP,
    )] = "vllm:"
    kv_events: Annotated[str | None, Spec(
        "address, `tcp://127.0.0.1:PORT` or `ipc://PATH`, where routers subscribe to what enters and leaves the "
        "prefix cache",
        "The token ids of prompts are in it. See [routers](http.md#several-daemons-behind-a-router).",
        unset="nothing is told", group=HTTP, check=check_address, like=("kv_events_config",),
    )] = None
    kv_events_replay: Annotated[str | None, Spec(
        "address of the same kind, where routers ask for what they have missed of `--kv-events`",
        unset="nothing is repeated", group=HTTP, check=check_address,
    )] = None
    log_requests: Annotated[str, Spec(
        "a line on stderr for each HTTP request when it ends: `none`, `text` or `json`",
        group=HTTP, choices=("none", "text", "json"), like=("enable_log_requests", "disable_log_requests"),
    )] = "none"
    context_length: Annotated[int | None, Spec(
        "longest prompt plus output of one request",
        "Not above the model's `max_position_embeddings`, or what YaRN makes of it.",
        unit="tokens", unset="the model's own", group=MODEL, low=2, high=2**30,
        aliases=("max_model_len", "max_seq_len"), like=("ctx_size", "num_ctx", "n_ctx", "c"),
    )] = None
    page_size: Annotated[int | None, Spec(
        "size of a page of the KV cache, the unit of allocation and of prefix sharing",
        "Smaller pages share more and cost more bookkeeping.",
        unit="tokens", unset="16 on CPU, 64 on GPU", group=MEMORY, low=1, high=4096, aliases=("block_size",),
    )] = None
    max_total_tokens: Annotated[int | None, Spec(
        "size of the KV cache; wins over `--mem-fraction-static`",
        unit="tokens", unset="as --mem-fraction-static allows, on CPU at most 4 GiB", group=MEMORY, low=1, high=2**40,
        like=("num_gpu_blocks_override",),
    )] = None
    mem_fraction_static: Annotated[float, Spec(
        "part of the memory that weights and KV cache together may take",
        unit="of the free memory", group=MEMORY, low=0, high=1, above_low=True, like=("gpu_memory_utilization",),
    )] = 0.85
    max_running_requests: Annotated[int, Spec(
        "requests that generate at the same time; more wait",
        unit="requests", group=MEMORY, low=1, high=65_536, aliases=("max_num_seqs",),
        like=("parallel", "np"),
    )] = 256
    max_queued_requests: Annotated[int, Spec(
        "requests that may wait; one more is refused as `overloaded`",
        unit="requests", group=MEMORY, low=1, high=10_000_000,
    )] = 2048
    chunked_prefill_size: Annotated[int | None, Spec(
        "prompt tokens that one step computes at most; longer prompts are cut into chunks",
        "So running streams do not stall.",
        unit="tokens", unset="512 on CPU, 8192 on GPU", group=MEMORY, low=1, high=2**20,
        like=("max_num_batched_tokens", "max_prefill_tokens", "batch_size", "ubatch_size", "num_batch"),
    )] = None
    max_step_stretch: Annotated[float, Spec(
        "while requests stream, a step that also computes prompts takes at most so many times as long as one that "
        "does not; more gets prompts done sooner, and streams wait longer between tokens",
        "By the scheduler's estimate. The default keeps gaps between a stream's tokens under about 5 times what "
        "they are without prompts. Where nobody streams there is no such limit: prompts are then done first, which "
        "gives more tokens a second.",
        unit="decode steps", group=MEMORY, low=1, high=1_000_000, above_low=True,
    )] = 3.0
    schedule_policy: Annotated[str, Spec(
        "who runs first: `fcfs` (arrival), `lpm` (longest cached prefix), `dfs-weight` (largest shared prefix, its "
        "requests together), `priority` (highest priority)",
        group=MEMORY, choices=("fcfs", "lpm", "dfs-weight", "priority"), aliases=("scheduling_policy",),
    )] = "fcfs"
    fairness: Annotated[str, Spec(
        "whose request is next, in the policy's order: `sessions` (a client's connections take turns, by tokens, "
        "however many requests each has waiting), `none` (the order alone)",
        "A short prompt of another session does not wait for the end of a long one.",
        group=MEMORY, choices=("sessions", "none"),
    )] = "sessions"
    disable_radix_cache: Annotated[bool, Spec(
        "do not share the KV cache between requests with a common prefix",
        group=MEMORY,
        like=("enable_prefix_caching", "no_enable_prefix_caching"),
    )] = False
    cache_dir: Annotated[str | None, Spec(
        "folder that keeps the prefix cache on disk, so that a restart finds prompts and conversations again",
        "One engine at a time. What is in it tells of prompts. See [the tier on disk](scheduling.md#the-tier-on-disk).",
        unset="the cache ends with the engine", group=MEMORY, path=True,
        like=("hicache_storage_backend", "kv_transfer_config", "local_disk", "slot_save_path"),
    )] = None
    cache_dir_size: Annotated[float, Spec(
        "what the files in `--cache-dir` may take; the least recently used ones are removed",
        unit="GB", group=MEMORY, low=0, high=1_000_000, above_low=True, aliases=("max_local_disk_size",),
    )] = 10.0
    hicache_size: Annotated[float, Spec(
        "on a GPU, host memory for pages of the prefix cache that have to leave the GPU's; they are copied back when a "
        "request needs them. 0 is none",
        "All ranks share it. It is taken at the start, and pinned.",
        unit="GB", group=MEMORY, low=0, high=1_000_000,
        like=("enable_hierarchical_cache", "hicache_ratio", "kv_offloading_size", "max_local_cpu_size"),
    )] = 0.0
    disable_overlap: Annotated[bool, Spec(
        "plan a step only when the result of the one before it is back: slower, and simpler to debug",
        group=MEMORY, aliases=("disable_overlap_schedule",),
    )] = False
    speculative_algorithm: Annotated[str, Spec(
        "guess several tokens of a request at once and keep those that come true: `ngram` looks for its last tokens in "
        "what it has and guesses what followed there, `draft` asks a smaller model, `none` does not. The output is the "
        "same",
        "`ngram` is faster where the output repeats what was there before: code, quotes, summaries, JSON. How many "
        "tokens are guessed follows from how many came true, and none are where a step has so many rows that they "
        "would cost more than they bring. On a GPU requests with a grammar or a thinking budget guess nothing. "
        "See [scheduling](scheduling.md#speculative-decoding).",
        group=MEMORY, choices=("none", "ngram", "draft"), like=("speculative_config", "spec_type"),
    )] = "none"
    draft_model_path: Annotated[str | None, Spec(
        "the folder of a model that guesses, a smaller Qwen3 of the same vocabulary; it turns on "
        "`--speculative-algorithm draft`",
        "On a CPU, or on one GPU without `--deterministic`. Its weights and its own KV cache take memory beside the "
        "large model's.",
        unset="none", group=MEMORY, path=True, aliases=("speculative_draft_model_path",),
        like=("speculative_model", "model_draft"),
    )] = None
    speculative_num_draft_tokens: Annotated[int, Spec(
        "with `--speculative-algorithm`, tokens that are guessed at once, at most",
        unit="tokens", group=MEMORY, low=1, high=64, aliases=("num_speculative_tokens",), like=("draft_max",),
    )] = 12
    deterministic: Annotated[bool, Spec(
        "a request with a seed, or greedy, has the same tokens and logprobs to the last bit whatever runs beside it, "
        "however its prompt is cut into chunks, cached, retracted or speculated, and after any restart",
        "On one kind of CPU or GPU, with one number of ranks. Prompts take longer, on a GPU steps of few rows too: see "
        "[determinism](scheduling.md#determinism). For dense models; on a CPU with the compiled kernels, in bf16, fp32 "
        "and int8, on at most two ranks; on one GPU in bf16 and fp32.",
        group=MEMORY, aliases=("enable_deterministic_inference",),
    )] = False
    disable_cuda_graph: Annotated[bool, Spec(
        "on a GPU, do not capture steps of generating requests as graphs: slower, starts sooner",
        group=MEMORY, like=("enforce_eager",),
    )] = False
    cuda_graph_max_bs: Annotated[int | None, Spec(
        "the largest number of generating requests for which steps are captured as graphs",
        unit="requests", unset="as many as --max-running-requests", group=MEMORY, low=1, high=4096,
    )] = None
    disable_custom_all_reduce: Annotated[bool, Spec(
        "on several GPUs of one machine, leave all sums over ranks to NCCL, also those of few rows",
        group=PARALLELISM,
    )] = False
    num_threads: Annotated[int | None, Spec(
        "threads of each rank",
        unit="threads", unset="cores / ranks on this machine", group=PARALLELISM, low=1, high=4096,
        like=("threads", "threads_batch", "num_thread", "t"),
    )] = None
    seed: Annotated[int, Spec(
        "seed of the weights of `--load-format dummy`",
        "Requests have seeds of their own.",
        group=MODEL, low=0, high=2**63 - 1, like=("random_seed",),
    )] = 0
    step_timeout: Annotated[float, Spec(
        "a rank that does not answer a step for this long is taken for hung, dumped and killed",
        "Its stacks go to stderr, and the ranks start again.",
        unit="seconds", group=DAEMON, low=0, high=86_400, above_low=True, like=("watchdog_timeout",),
    )] = 30.0
    restart: Annotated[str, Spec(
        "when a process of the engine dies: `on-failure` starts it again, and requests go on from the tokens they "
        "have; `never` ends the engine with one clear error for every request",
        group=DAEMON, choices=("on-failure", "never"),
    )] = "on-failure"
    max_restarts: Annotated[int, Spec(
        "restarts of one process within a minute; when it dies once more, the engine ends",
        "With the cause, and exit code 1.",
        group=DAEMON, low=0, high=1_000_000,
    )] = 3
    no_standby: Annotated[bool, Spec(
        "keep no spare process for each rank; it has done its imports, which makes a restart seconds faster, and takes "
        "150 MB",
        "It is made 5 s after the engine is ready, where 1 GiB and a fifth of the memory are free.",
        group=DAEMON,
    )] = False
    log_level: Annotated[str, Spec(
        "how much is logged to stderr: `debug`, `info`, `warning`, `error`",
        group=DAEMON, choices=("debug", "info", "warning", "error"),
    )] = "info"
    trace: Annotated[str | None, Spec(
        "file to record every input and decision of the scheduler to, for an exact replay; prompts are in it",
        "Treat it like the requests themselves.",
        unset="no trace", group=INSIDE, path=True,
    )] = None
    profile: Annotated[str | None, Spec(
        "folder to write timelines of steps and requests to, a file a process, for ui.perfetto.dev",
        "Steps, their rows and where each step's time went, and each request's life. `python -m "
        "vibe_sgl_lite.runtime.chrome_trace FOLDER` lays them together in one file.",
        unset="no timeline", group=INSIDE, path=True,
    )] = None
    debug_rank_digest: Annotated[bool, Spec(
        "compare every step's batch and sampled tokens over all ranks; a difference ends the engine and names the "
        "step",
        "Two small collectives a step.",
        group=INSIDE,
    )] = False
    # fmt: on
