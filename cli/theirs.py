"""Flags of `lmdeploy serve api_server` (0.18.0) and `vllm serve` (0.33.0): ours for each, or why there is none.

One row for flags with one answer. From here come the refusals of the command line (a flag that is not ours is never
ignored) and the tables of the migration pages. Facts about two other programs; knows nothing of the program itself.
"""

from __future__ import annotations

from dataclasses import dataclass

LATER = "in a later version"


@dataclass(frozen=True, slots=True)
class Theirs:
    """`flags`: their names, with spaces between; `ours`: flags, or keys for `--set`; "" where `why` is all there is to say."""

    flags: str
    ours: str
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.flags.split())

    @property
    def sentence(self) -> str:
        """What the command line says of such a flag."""
        ours = "; ".join(self.ours.split())
        return f"write {ours} ({self.why.removesuffix('.')})." if self.ours else self.why


_TOOLS = f"tool calling comes {LATER}; leave it out."
_REASONING = f"splitting off reasoning text comes {LATER}; leave it out."
_TEXT = "models are text only; leave it out."
_LORA = f"LoRA adapters come {LATER}; leave it out."
_SPECULATION = f"speculative decoding comes {LATER}; leave it out."
_DP = f"data parallelism comes {LATER}; leave it out."
_MOE = f"mixtures of experts come {LATER}; leave it out."
_CONTEXT = f"context parallelism comes {LATER}; leave it out."
_MACHINES = f"several machines come {LATER}; leave it out."
_DISAGGREGATED = f"separate prefill and decode come {LATER}; leave it out."
_OFFLOAD = f"weights and K/V moved to the host come {LATER}; leave it out."
_MAMBA = "models with recurrent state are not served; leave it out."
_DIFFUSION = "diffusion language models are not served; leave it out."
_POOLING = f"embeddings and scores come {LATER}; leave it out."
_KERNELS = "numbatch has one kernel a job, tuned by a table; leave it out."
_GRAPHS = "every batch size has its graph, made at the start; leave it out."
_RANKS = "ranks are processes of this machine; leave it out."
_CODE = "numbatch never runs code that comes from elsewhere; leave it out."
_FILES = "safetensors and GGUF files are mapped and read in parallel; leave it out."
_RESIDENT = "weights stay where they are while the server sleeps; leave it out."
_COMPARE = f"raw log probabilities come back; others come {LATER}. Leave it out."
_LOGS = "neither prompts nor answers are ever logged; leave it out."
_OVERRIDE = "the checkpoint's own config.json is what is read; change it there."

LMDEPLOY = (
    Theirs("--server-name", "--server-name", "the default is 127.0.0.1, not 0.0.0.0."),
    Theirs("--server-port", "--server-port", "the same default, 23333."),
    Theirs("--allow-origins", "--allow-origins", "the default is no origin, not every one."),
    Theirs("--allow-credentials --allow-methods --allow-headers", "--allow-credentials --allow-methods --allow-headers",
           "credentials together with the origin * are refused."),
    Theirs("--api-keys --ssl", "--api-keys --ssl", "the same; NUMBATCH_API_KEYS keeps keys off the command line."),
    Theirs("--log-level", "--log-level", "the same names; the default is INFO."),
    Theirs("--model-name --revision --download-dir", "--model-name --revision --download-dir", "the same."),
    Theirs("--chat-template", "--chat-template", "a built-in name, LMDeploy's JSON or a Jinja file."),
    Theirs("--backend", "--backend", "both names mean numbatch's one engine."),
    Theirs("--device", "--device", "auto, cpu, cuda; not ascend, maca or camb."),
    Theirs("--dtype", "--dtype", "also float32, the exact mode."),
    Theirs("--model-format", "--model-format", "always read from the files; a wrong name is refused."),
    Theirs("--tp", "--tp", "the model's heads must divide by it; it need not be a power of two."),
    Theirs("--session-len --max-batch-size", "--session-len --max-batch-size", "the same; the batch is 256 on a card, 64 elsewhere."),
    Theirs("--cache-max-entry-count", "--cache-max-entry-count", "the same: a share of what is free after the weights, 0.8."),
    Theirs("--num-gpu-blocks", "cache.num_blocks", "as --set cache.num_blocks=N."),
    Theirs("--cache-block-seq-len --kernel-block-size", "--cache-block-seq-len",
           "one size of a block, for the cache and for the kernels."),
    Theirs("--enable-prefix-caching", "--enable-prefix-caching", "on by default; --set cache.enable_prefix_caching=false switches it off."),
    Theirs("--quant-policy", "--quant-policy", "0, 4, 8; int4 and int8 are read as well."),
    Theirs("--rope-scaling-factor", "--rope-scaling-factor", "the same."),
    Theirs("--max-prefill-token-num --num-tokens-per-iter", "--max-prefill-token-num", "tokens of a step, decoding included."),
    Theirs("--max-concurrent-requests", "--max-requests", "one more than that is answered 503 instead of waiting."),
    Theirs("--enable-abort-handling", "", "POST /abort_request is always there; leave it out."),
    Theirs("--max-prefill-iters", "", "prompts are cut by --max-prefill-token-num and mixed with decoding in every step; leave it out."),
    Theirs("--async", "", "a step is always planned while the one before it runs; leave it out."),
    Theirs("--eager-mode", "", "there is no graph mode to switch off; leave it out."),
    Theirs("--piecewise-cudagraph-max-tokens --cudagraph-capture-batch-sizes", "", _GRAPHS),
    Theirs("--communicator --moe-a2a-backend --enable-microbatch", "", "ranks have one way to talk, chosen for the cards; leave it out."),
    Theirs("--distributed-executor-backend", "", _RANKS),
    Theirs("--disable-metrics", "", "/metrics costs next to nothing and cannot be switched off; leave it out."),
    Theirs("--disable-fastapi-docs", "", "/docs is a static page and cannot be switched off; leave it out."),
    Theirs("--allow-terminate-by-client", "", "a client cannot end the server; send it SIGTERM."),
    Theirs("--max-log-len", "", _LOGS),
    Theirs("--trust-remote-code", "", _CODE),
    Theirs("--hf-overrides", "", _OVERRIDE),
    Theirs("--generation-config", "", "sampling begins at OpenAI's defaults; say what you want in the request."),
    Theirs("--empty-init", "", "weights come from the checkpoint; leave it out."),
    Theirs("--logprobs-mode", "", _COMPARE),
    Theirs("--adapters", "", _LORA),
    Theirs("--proxy-url", "", f"the request distributor comes {LATER}; leave it out."),
    Theirs("--tool-call-parser", "", _TOOLS),
    Theirs("--reasoning-parser", "", _REASONING),
    Theirs("--speculative-algorithm --speculative-draft-model --speculative-num-draft-tokens --speculative-dflash-block-size", "",
           _SPECULATION),
    Theirs("--vision-max-batch-size --language-model-only --allowed-media-domains", "", _TEXT),
    Theirs("--dp", "", _DP),
    Theirs("--ep --enable-eplb --enable-return-routed-experts", "", _MOE),
    Theirs("--cp", "", _CONTEXT),
    Theirs("--nnodes --node-rank --dist-init-addr", "", _MACHINES),
    Theirs("--role --migration-backend --kv-transfer-config", "", _DISAGGREGATED),
    Theirs("--dllm-block-length --dllm-unmasking-strategy --dllm-denoising-steps --dllm-confidence-threshold", "", _DIFFUSION),
    Theirs("--prefix-cache-state-budget --prefix-cache-decode-state-interval", "", _MAMBA),
)  # fmt: skip

VLLM = (
    Theirs("--model", "MODEL", "the model is the first word: numbatch serve api_server MODEL."),
    Theirs("--host --port", "--server-name --server-port", "read as such; the defaults are 127.0.0.1 and 23333."),
    Theirs("--served-model-name", "--model-name", "read as such; one name."),
    Theirs("--tensor-parallel-size", "--tp", "read as such."),
    Theirs("--max-model-len", "--session-len", "read as such; a number, not 32k or auto."),
    Theirs("--max-num-seqs", "--max-batch-size", "read as such."),
    Theirs("--gpu-memory-utilization --device-memory-utilization", "--cache-max-entry-count",
           "read as such, and another share: of what is free after the weights, for K/V; vLLM's is of all memory, for everything."),
    Theirs("--kv-cache-memory-bytes", "cache.num_blocks", "counted in blocks, as --set cache.num_blocks=N; --plan says how large one is."),
    Theirs("--num-gpu-blocks-override", "cache.num_blocks", "as --set cache.num_blocks=N."),
    Theirs("--block-size", "--cache-block-seq-len", "a power of two up to 128; 64 unless told otherwise."),
    Theirs("--kv-cache-dtype", "--quant-policy", "0 as computed, 8 int8, 4 int4."),
    Theirs("--enable-prefix-caching", "--enable-prefix-caching", "on by default; --set cache.enable_prefix_caching=false switches it off."),
    Theirs("--max-num-batched-tokens --max-num-scheduled-tokens", "--max-prefill-token-num", "tokens of a step, decoding included."),
    Theirs("--max-num-queued-reqs", "--max-requests", "sequences that wait or run; one more is answered 503."),
    Theirs("--max-num-queued-tokens", "admission.max_queue_tokens", "as --set admission.max_queue_tokens=N."),
    Theirs("--max-num-active-seqs", "--max-batch-size", "graphs cost little; one number for both."),
    Theirs("--api-key", "--api-keys", "and they protect every route but health; NUMBATCH_API_KEYS keeps keys off the command line."),
    Theirs("--ssl-keyfile --ssl-certfile", "server.ssl_keyfile server.ssl_certfile", "as --set, or --ssl as LMDeploy has it."),
    Theirs("--allowed-origins --allowed-methods --allowed-headers", "--allow-origins --allow-methods --allow-headers",
           "words with spaces between, no JSON."),
    Theirs("--allow-credentials", "--allow-credentials", "the same."),
    Theirs("--dtype --revision --download-dir", "--dtype --revision --download-dir", "the same; --dtype float32 is the exact mode."),
    Theirs("--tokenizer", "model.tokenizer", "as --set model.tokenizer=PATH."),
    Theirs("--chat-template", "--chat-template", "a built-in name, LMDeploy's JSON or a Jinja file."),
    Theirs("--config", "--config", "a TOML file, no YAML: docs/config.md."),
    Theirs("--log-level --uvicorn-log-level", "--log-level", "one level for all; CRITICAL, ERROR, WARNING, INFO, DEBUG."),
    Theirs("--logging-config --log-config-file", "server.log_format", "json or text, as --set server.log_format=json."),
    Theirs("--disable-log-stats", "server.log_stats_s", "as --set server.log_stats_s=0."),
    Theirs("--otlp-traces-endpoint", "telemetry.otlp_endpoint", "as --set telemetry.otlp_endpoint=URL."),
    Theirs("--sse-keep-alive-interval", "http.sse_ping_s", "as --set http.sse_ping_s=S; 15 unless told otherwise."),
    Theirs("--max-logprobs", "request.max_top_logprobs", "as --set request.max_top_logprobs=N; 20 as there."),
    Theirs("--shutdown-timeout", "shutdown.drain_timeout_s", "as --set shutdown.drain_timeout_s=S."),
    Theirs("--h11-max-header-count --h11-max-incomplete-event-size", "http.max_headers http.max_header_line", "as --set."),
    Theirs("--watchdog-config", "engine.step_timeout_s", "as --set engine.step_timeout_s=S."),
    Theirs("--numa-bind --numa-bind-nodes --numa-bind-cpus", "", "the operating system places threads; start numbatch under numactl."),
    Theirs("--device-ids", "", "set CUDA_VISIBLE_DEVICES."),
    Theirs("--distributed-timeout-seconds --cpu-distributed-timeout-seconds", "engine.init_timeout_s", "as --set engine.init_timeout_s=S."),
    Theirs("--scheduling-policy", "", "requests carry priority, and equal ones go first come, first served; leave it out."),
    Theirs("--quantization --quantization-config --allow-deprecated-quantization", "",
           "the format is read from the checkpoint; leave it out."),
    Theirs("--load-format --config-format", "--model-format", "always read from the files; a wrong name is refused."),
    Theirs("--enable-sleep-mode --sleep-mode-backend --sleep-mode-offload-cudagraph --sleep-preserve-parameter-names "
           "--enable-cumem-allocator --enable-nccl-comm-suspend", "", "POST /sleep and /wakeup are always there. " + _RESIDENT),
    Theirs("--enable-prompt-tokens-details", "", "usage always says how many prompt tokens were cached; leave it out."),
    Theirs("--enable-force-include-usage", "", "ask for stream_options.include_usage in the request."),
    Theirs("--enable-request-id-headers", "", "every answer has X-Request-Id; leave it out."),
    Theirs("--enable-chunked-prefill --long-prefill-token-threshold --long-prefill-token-threshold-adaptive "
           "--prefill-schedule-interval --scheduler-reserve-full-isl --watermark --async-scheduling --scheduler-cls", "",
           "prompts are always cut, mixed with decoding and planned a step ahead; leave it out."),
    Theirs("--stream-interval", "", "a reader gets each token as it comes, and several at once when it is behind; leave it out."),
    Theirs("--seed", "", "requests carry a seed; without one answers differ."),
    Theirs("--default-chat-template-kwargs --reasoning-effort-map", "", "give chat_template_kwargs in the request."),
    Theirs("--trust-request-chat-template --chat-template-content-format --response-role", "",
           "the template is the server's, its content text, its role assistant; leave it out."),
    Theirs("--generation-config --override-generation-config", "",
           "sampling begins at OpenAI's defaults; say what you want in the request."),
    Theirs("--return-tokens-as-token-ids", "", "ask for return_token_ids in the request."),
    Theirs("--disable-uvicorn-access-log --disable-access-log-for-endpoints", "",
           "health checks are logged at DEBUG only; --log-level WARNING leaves out every access."),
    Theirs("--max-log-len --enable-log-requests --enable-log-outputs --enable-log-deltas", "", _LOGS),
    Theirs("--log-error-stack --aggregate-engine-logging --enable-logging-iteration-details", "", "--log-level DEBUG has a line a step."),
    Theirs("--disable-fastapi-docs --enable-offline-docs", "", "/docs is a static page that loads nothing; leave it out."),
    Theirs("--root-path", "", "no page of numbatch needs it; have the proxy strip the prefix."),
    Theirs("--middleware --logits-processors --io-processor-plugin --worker-cls --worker-extension-cls --tool-parser-plugin "
           "--reasoning-parser-plugin --model-class-overrides --trust-remote-code", "", _CODE),
    Theirs("--uds", "", f"a socket of the file system comes {LATER}; bind 127.0.0.1."),
    Theirs("--grpc --grpc-port", "", "there is HTTP only; leave it out."),
    Theirs("--ssl-ca-certs --ssl-cert-reqs --ssl-ciphers --enable-ssl-refresh", "",
           "certificates of clients, ciphers of your own and reloading are a proxy's work; leave it out."),
    Theirs("--api-server-count --headless --renderer-num-workers", "", "one process serves HTTP; bench/LOG.md says how much it carries."),
    Theirs("--enable-tokenizer-info-endpoint --enable-server-load-tracking --enable-per-request-metrics", "",
           "/server_info, /metrics and usage say what there is to know; leave it out."),
    Theirs("--fingerprint-mode --fingerprint-value", "", "system_fingerprint is a digest of version, model and dtype; leave it out."),
    Theirs("--enforce-eager", "", "there is no graph mode to switch off; leave it out."),
    Theirs("--cudagraph-capture-sizes --max-cudagraph-capture-size --cudagraph-metrics --compilation-config --optimization-level "
           "--performance-mode", "", _GRAPHS),
    Theirs("--attention-backend --attention-config --kernel-config --linear-backend --ir-op-priority --enable-flashinfer-autotune "
           "--monokernel --sparse-indexer-topk-backend --disable-cascade-attn --use-fp64-gumbel --model-impl "
           "--enable-batch-sharded-sampling --jit-monitor-mode --jit-monitor-verbose", "", _KERNELS),
    Theirs("--distributed-executor-backend --disable-custom-all-reduce --enable-shm-tensor-arena --max-parallel-loading-workers "
           "--ray-workers-use-nsight --fail-on-environ-validation", "", _RANKS),
    Theirs("--pipeline-parallel-size", "", f"pipeline parallelism comes {LATER}; leave it out."),
    Theirs("--data-parallel-size --data-parallel-rank --data-parallel-start-rank --data-parallel-size-local --data-parallel-address "
           "--data-parallel-rpc-port --data-parallel-backend --data-parallel-hybrid-lb --data-parallel-external-lb "
           "--data-parallel-multi-port-external-lb --data-parallel-supervisor-port --dp-supervisor-probe-interval-s "
           "--dp-supervisor-probe-timeout-s --dp-supervisor-probe-failure-threshold --dp-sync-interval "
           "--disable-nccl-for-dp-synchronization --enable-fault-tolerance --fault-tolerance-config", "", _DP),
    Theirs("--master-addr --master-port --nnodes --node-rank", "", _MACHINES),
    Theirs("--decode-context-parallel-size --dcp-comm-backend --dcp-q-replicate --dcp-kv-cache-interleave-size "
           "--cp-kv-cache-interleave-size --prefill-context-parallel-size --enable-hc-sp", "", _CONTEXT),
    Theirs("--enable-expert-parallel --enable-ep-weight-filter --all2all-backend --enable-dbo --ubatch-size --enable-elastic-ep "
           "--elastic-ep-max-dp-size --dbo-decode-token-threshold --dbo-prefill-token-threshold --enable-eplb --eplb-config "
           "--expert-placement-strategy --moe-backend --enable-return-routed-experts", "", _MOE),
    Theirs("--enable-lora --lora-modules --max-loras --max-lora-rank --lora-dtype --enable-tower-connector-lora --max-cpu-loras "
           "--fully-sharded-loras --lora-target-modules --default-mm-loras --specialize-active-lora --enable-mixed-moe-lora-format "
           "--enable-moe-shared-loras --max-lora-cls-labels", "", _LORA),
    Theirs("--speculative-config --spec-method --spec-model --spec-tokens --per-request-spec-decode-metrics", "", _SPECULATION),
    Theirs("--enable-auto-tool-choice --exclude-tools-when-tool-choice-none --tool-call-parser --tool-strict-level --tool-server", "",
           _TOOLS),
    Theirs("--reasoning-parser --reasoning-config --anthropic-disabled-thinking-effort", "", _REASONING),
    Theirs("--cohere-format --cohere-is-reasoning-model", "", "Cohere's protocol is not spoken; leave it out."),
    Theirs("--structured-outputs-config", "", f"structured output comes {LATER}; leave it out."),
    Theirs("--limit-mm-per-prompt --enable-mm-embeds --media-io-kwargs --mm-processor-kwargs --mm-processor-cache-gb "
           "--mm-processor-cache-type --mm-hasher-algorithm --mm-shm-cache-max-object-size-mb --mm-encoder-only --mm-encoder-tp-mode "
           "--mm-encoder-attn-backend --mm-encoder-attn-dtype --mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path "
           "--mm-encoder-fp8-scale-save-margin --interleave-mm-strings --skip-mm-profiling --video-pruning-rate --video-pruning-method "
           "--mm-tensor-ipc --mm-processor-device --mm-ipc-gpu-memory-gb --mm-device-do-normalize --language-model-only "
           "--allowed-local-media-path --allowed-media-domains --trust-request-mm-kwargs --disable-chunked-mm-input "
           "--ec-transfer-config --ec-manager-config", "", _TEXT),
    Theirs("--mamba-backend --mamba-ssu-algorithm --enable-mamba-cache-stochastic-rounding --mamba-cache-philox-rounds "
           "--mamba-cache-dtype --mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode --enable-mamba-shared-prefix-checkpoint "
           "--replayssm-buffer-len --use-replayssm --disable-hybrid-kv-cache-manager --gdn-prefill-backend --kda-prefill-backend "
           "--kda-decode-backend", "", _MAMBA),
    Theirs("--diffusion-config", "", _DIFFUSION),
    Theirs("--runner --convert --pooler-config --enable-flash-late-interaction", "", _POOLING),
    Theirs("--kv-transfer-config --kv-events-config --tokens-only --enable-scale-out", "", _DISAGGREGATED),
    Theirs("--kv-offloading-size --kv-offloading-backend --offload-backend --cpu-offload-gb --cpu-offload-params --offload-group-size "
           "--offload-num-in-group --offload-prefetch-step --offload-params", "", _OFFLOAD),
    Theirs("--prefix-caching-hash-algo --prefix-cache-retention-interval --prefix-match-unit --kv-cache-dtype-skip-layers "
           "--kv-sharing-fast-prefill --swa-bounded-replay", "", "blocks are found by SHA-256 and kept as long as they can; leave it out."),
    Theirs("--disable-sliding-window", "", "a sliding window is part of the model; leave it out."),
    Theirs("--safetensors-load-strategy --safetensors-prefetch-num-threads --safetensors-prefetch-block-size "
           "--model-loader-extra-config --ignore-patterns --use-tqdm-on-load --pt-load-map-location --weight-transfer-config", "", _FILES),
    Theirs("--tokenizer-mode --skip-tokenizer-init --enable-prompt-embeds", "",
           "one tokenizer reads tokenizer.json, SentencePiece, tiktoken and GGUF; leave it out."),
    Theirs("--code-revision --tokenizer-revision --hf-config-path --hf-token", "",
           "--revision is for the whole model; a token comes from HF_TOKEN. Leave it out."),
    Theirs("--hf-overrides", "", _OVERRIDE),
    Theirs("--logprobs-mode --return-sampling-mask --enable-trace-replay", "", _COMPARE),
    Theirs("--show-hidden-metrics-for-version --collect-detailed-traces --kv-cache-metrics --kv-cache-metrics-sample "
           "--custom-histogram-buckets --enable-layerwise-nvtx-tracing --enable-mfu-metrics --profiler-config", "",
           "/metrics is one set, which docs/operating.md lists; python -m bench.profile records kernels. Leave it out."),
    Theirs("--engram-config --watermark-config --aux-output-config --additional-config", "", "there is nothing of the kind; leave it out."),
)  # fmt: skip


def refusals() -> dict[str, str]:
    """A flag that is called otherwise here, or is not here -> the sentence. Of a name that both have, LMDeploy's counts."""
    found = {name: row.sentence for row in (*VLLM, *LMDEPLOY) for name in row.names if name not in row.ours.split()}
    return {f"--no-{name.removeprefix('--')}": sentence for name, sentence in found.items()} | found


def table(rows: tuple[Theirs, ...]) -> str:
    """As a Markdown table."""
    lines = ["| there | here | what that means, or why not |", "|---|---|---|"]
    for row in rows:
        there = ", ".join(f"`{name}`" for name in row.names)
        here = ", ".join(f"`{name}`" for name in row.ours.split()) or "no equivalent"
        why = row.why.removesuffix(".").removesuffix(" Leave it out").removesuffix("; leave it out").removesuffix(".")
        lines.append(f"| {there} | {here} | {why} |")
    return "\n".join(lines)
