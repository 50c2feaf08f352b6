"""What every part costs: multiply-accumulates and FLOPs by formula, prefill latency and KV memory by measurement.

    python -m train.studies.flops --out runs/flops
    python -m train.studies.flops --out runs/flops --latency smollm2-135m --tokens 1024 4096 8192

The formulas are checked against torch's own counter on the meta device (tests/training/studies/test_flops.py).
Conventions: a MAC is one multiplication with its addition, 1 MAC = 2 FLOPs. "linear" is all that grows linearly with
the tokens; "attention" is Q K^T and A V over the full square of queries and keys (a kernel that skips what is masked
does half of it in the LLM).
Norms, activations, RoPE and softmax are left out, as counters do. A backward pass costs once more for the activations'
gradients and once more for the weights' where these are trained; activation checkpointing adds a forward pass.

N patches of the slide, K kept.
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from sparsewsi.files import write_json, write_text
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import default_device, default_dtype, load_llm
from sparsewsi.model.slide_encoder import DILATIONS, SEGMENTS
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command

PATCHES = (64, 256, 1024, 1842, 4096, 10_240, 38_400, 100_000)  # 1,842: the average slide of TC-SSA
TEXT = 98  # text tokens: with 32 visual ones the only number for which the paper's convention rounds to its 1.70T
QWEN = "qwen2.5-7b"
SMOLLM2 = "smollm2-135m"
PATHS = ("sparse inference", "all-N inference", "training, forward")


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> "Cost":
        return Cost(times * self.linear, times * self.attention)

    @property
    def flops(self) -> float:
        """With attention's quadratic part."""
        return 2 * (self.linear + self.attention)


@dataclass(frozen=True)
class Line:
    """One part of one path."""

    path: str
    part: str
    cost: Cost
    in_total: bool = True  # the patch encoder runs once a slide, before and apart from all questions


def architecture(name: str) -> PreTrainedConfig:
    """The shape of an LLM, written down from its published config.json: neither weights nor a network are needed.

    Raises ValueError for an LLM that is not known here.
    """
    if name == QWEN:
        return Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False,
            rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        )  # fmt: skip
    if name == SMOLLM2:
        return LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        )  # fmt: skip
    raise ValueError(f"no architecture is written down for {name!r}; choose {QWEN} or {SMOLLM2}.")


# ------------------------------------------------------------------------------------------------------------ the parts


def llm_layers(llm: PreTrainedConfig, tokens: int, seen: int = 0) -> Cost:
    """All layers without the head, for `tokens` new tokens behind `seen` cached ones."""
    width, heads = llm.hidden_size, llm.num_attention_heads
    head = getattr(llm, "head_dim", None) or width // heads
    per_token = 2 * width * head * (heads + llm.num_key_value_heads) + 3 * width * llm.intermediate_size
    square = 2 * tokens * (seen + tokens) * heads * head
    return Cost(llm.num_hidden_layers * tokens * per_token, llm.num_hidden_layers * square)


def llm_head(llm: PreTrainedConfig, rows: int) -> Cost:
    """Logits of `rows` tokens."""
    return Cost(rows * llm.hidden_size * llm.vocab_size)


def llm_decode(llm: PreTrainedConfig, seen: int, answer: int) -> Cost:
    """The answer tokens after the first one (whose logits the prefill gives), one at a time, with the head."""
    total = llm_head(llm, answer - 1)
    for token in range(answer - 1):
        total += llm_layers(llm, 1, seen + token)
    return total


def block(dim: int, n: int, attention: str, ffn: int = 4) -> Cost:
    """A block of scorer or denoiser; with local attention no query and key remain (sparsewsi.model.selector.Block)."""
    if attention == "global":
        return Cost(n * (4 + 2 * ffn) * dim**2, 2 * n * n * dim)
    return Cost(n * (2 + 2 * ffn) * dim**2)


def cost_scorer(config: SparseWSIConfig, n: int) -> Cost:
    """Scores of n patches."""
    hidden = config.scorer_width
    inlet = Cost(n * config.dim * hidden) if hidden != config.dim else Cost()
    return inlet + block(hidden, n, config.scorer_attention) * config.scorer_layers + Cost(n * hidden)


def cost_slide_encoder(config: SparseWSIConfig, n: int) -> Cost:
    """Visual tokens of n patches."""
    inlet = Cost(n * config.feature_dim * config.dim)
    if config.slide_encoder == "none":
        return inlet
    if config.slide_encoder == "pointwise":
        return inlet + Cost(n * 8 * config.dim**2) * config.slide_encoder_layers
    square = 0.0  # longnet: all heads see n / dilation tokens of every segment
    for segment, dilation in zip(SEGMENTS, DILATIONS):
        length = min(segment, -(-n // dilation) * dilation)
        square += -(-n // length) * (length // dilation) ** 2 * 2 * config.dim
    return inlet + Cost(n * 8 * config.dim**2, square) * config.slide_encoder_layers


def cost_projector(config: SparseWSIConfig, llm: PreTrainedConfig, n: int) -> Cost:
    """n visual tokens into the LLM's width, two layers."""
    return Cost(n * llm.hidden_size * (config.dim + llm.hidden_size))


def soft_topk_and_gate(config: SparseWSIConfig, n: int) -> Cost:
    """Elementwise work that counters leave out: about 8 operations a score for alpha, and the gate c x + d eps."""
    return Cost(n * (8 + 2 * config.dim))


def vit_base(size: int = 224, patch: int = 16) -> Cost:
    """ViT-B/16 on one patch (CONCH's trunk; its pooling head is left out)."""
    tokens, width = (size // patch) ** 2 + 1, 768
    return Cost((tokens - 1) * 3 * patch**2 * width + 12 * tokens * 12 * width**2, 12 * 2 * tokens**2 * width)


def efficientnet_lite0() -> Cost:
    """EfficientNet-Lite0 on one patch, up to its 1280 features, as torch's counter finds it."""
    from efficientnet_lite_pytorch import EfficientNet
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        EfficientNet.from_name("efficientnet-lite0").eval().extract_features(torch.empty(1, 3, 224, 224))
    return Cost(counter.get_total_flops() / 2)


# --------------------------------------------------------------------------------------------------------- whole models


def lines(
    config: SparseWSIConfig, llm: PreTrainedConfig, n: int, patch: Cost | None, text: int = TEXT, answer: int = 16
) -> list[Line]:
    """Every part of the three paths for one slide of n patches and one question.

    patch: the patch encoder's cost of one patch; None leaves its line out.
    """
    k = min(config.num_tokens, n)
    encoder, score = cost_slide_encoder(config, n), cost_scorer(config, n)

    def language(path: str, visual: int) -> list[Line]:
        return [
            Line(path, "projector", cost_projector(config, llm, visual)),
            Line(path, "LLM prefill, layers", llm_layers(llm, visual + text)),
            Line(path, "LLM prefill, head (last token)", llm_head(llm, 1)),
            Line(path, f"LLM decode, {answer} tokens", llm_decode(llm, visual + text, answer)),
        ]

    sparse, full, training = PATHS
    found = [
        Line(sparse, "slide encoder", encoder),
        Line(sparse, "scorer", score),
        *language(sparse, k),
        Line(full, "slide encoder", encoder),
        *language(full, n),
        Line(training, "slide encoder", encoder),
        Line(training, "scorer", score),
        Line(training, "soft top-K and gate", soft_topk_and_gate(config, n)),
        Line(training, "denoiser", block(config.dim, n, "local")),
        Line(training, "projector", cost_projector(config, llm, n)),
        Line(training, "LLM, layers", llm_layers(llm, n + text + answer)),
        Line(training, "LLM, head (answer tokens)", llm_head(llm, answer)),
    ]
    if patch is None:
        return found
    return [line for path in PATHS for line in (Line(path, "patch encoder", patch * n, False), *_of(found, path))]


def _of(found: list[Line], path: str) -> list[Line]:
    return [line for line in found if line.path == path]


def total(found: list[Line], path: str) -> Cost:
    """Sum over a path's parts, without the patch encoder."""
    return sum((line.cost for line in _of(found, path) if line.in_total), Cost())


# ------------------------------------------------------------------------------------------- the paper's own column


@dataclass(frozen=True)
class Claim:
    """A figure of the paper beside what we get for it."""

    figure: str
    reading: str
    ours: float
    reproduced: bool
    unit: str = "T"  # 10^12 FLOPs


def linear_tera(tokens: int) -> float:
    """10^12 FLOPs of Qwen2.5-7B's linear layers for so many tokens, without head: the convention that gives 1.70."""
    return 2 * llm_layers(architecture(QWEN), tokens).linear / 1e12


def patches_within(low: float, high: float, tera: Callable[[int], float], most: int = 20_000) -> str:
    """The range of N for which tera(N), growing with N, lies in [low, high), in words."""
    first, end = (bisect_left(range(most), bound, key=tera) for bound in (low, high))
    return f"N = {first:,} to {end - 1:,}" if first < end else f"no N below {most:,}"


def claims() -> list[Claim]:
    """What of the paper's FLOPs column can be computed again."""
    llm = architecture(QWEN)
    local, whole = (
        SparseWSIConfig(llm=QWEN, feature_dim=512, dim=512, scorer_attention=kind) for kind in ("local", "global")
    )
    base = linear_tera(32 + TEXT)
    squared = llm_layers(llm, 10_240 + TEXT).flops / 1e12
    alone = patches_within(1.725, 1.735, lambda n: base + cost_scorer(local, n).flops / 1e12)
    seeing = patches_within(1.725, 1.735, lambda n: base + cost_scorer(whole, n).flops / 1e12)
    uncompressed = patches_within(133.25, 133.35, lambda n: linear_tera(n + TEXT))
    with_square = patches_within(133.25, 133.35, lambda n: llm_layers(llm, n + TEXT).flops / 1e12)
    return [
        Claim("1.70T", "32 + 98 tokens, 2 FLOPs a MAC, linear layers alone, no head", base, round(base, 2) == 1.70),
        Claim("1.70T", "the same with attention's square", llm_layers(llm, 130).flops / 1e12, True),
        Claim("1.70T", "the same with the head on all tokens", base + llm_head(llm, 130).flops / 1e12, False),
        Claim("1.70T", "counted as MACs", base / 2, False),
        Claim(
            "1.73T",
            f"a scorer of 2 blocks, d 512, on top, each patch scored alone as the paper's limitations say, N = 1,842; "
            f"1.73 would be {alone}, and the paper states no N",
            base + cost_scorer(local, 1842).flops / 1e12,
            False,
        ),
        Claim(
            "1.73T",
            f"the same with patches that see each other, N = 1,842: it fits, as any {seeing} does, but is a guess",
            base + cost_scorer(whole, 1842).flops / 1e12,
            False,
        ),
        Claim(
            "133.3T",
            f"N = 10,240 (SlideChat's limit), linear layers alone; 133.3 would be {uncompressed}",
            linear_tera(10_240 + TEXT),
            False,
        ),
        Claim("133.3T", f"N = 10,240 with attention's square; 133.3 would be {with_square}", squared, False),
        Claim("133.3T", "the 60-fold compression of Table 1's heading: N = 1,920", linear_tera(1920 + TEXT), False),
        Claim("133.3T", "the 128-fold compression of Figure 3: N = 4,096", linear_tera(4096 + TEXT), False),
        Claim(
            "< 5 %",
            "share of the visual encoder in the whole: ViT-B/16 (CONCH) on N = 10,240 patches, all of them through the "
            f"LLM, with attention; N = 1,842: {encoder_share(1842):.0f} %. It runs once a slide, not once a question",
            encoder_share(10_240),
            False,
            " %",
        ),
    ]


def encoder_share(n: int) -> float:
    """Percent of the patch encoder, ViT-B/16, in all-N inference with Qwen2.5-7B."""
    config = SparseWSIConfig(llm=QWEN, feature_dim=512, dim=512)
    patches = vit_base() * n
    rest = total(lines(config, architecture(QWEN), n, None), PATHS[1])
    return 100 * patches.flops / (patches + rest).flops


# ------------------------------------------------------------------------------------------------------ latency, memory


@dataclass(frozen=True)
class Latency:
    """Prefill of `tokens` visual tokens and the text, as measured."""

    tokens: int
    seconds: float  # median
    kv_bytes: int
    seconds_ratio: float  # over 32 tokens, median of the ratios within a round
    kv_ratio: float


@torch.inference_mode()
def measure_latency(llm: PreTrainedModel, tokens: tuple[int, ...], repeats: int = 5, text: int = TEXT) -> list[Latency]:
    """Time of prefill and size of the KV cache at 32 and at each number of visual tokens, in turn within each round.

    The content of the visual tokens does not matter to the time; they are noise.
    """
    sizes = (32, *tokens)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    kv_bytes: dict[int, int] = {}
    embedding = llm.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    weight = embedding.weight
    for repeat in range(repeats + 1):
        for size in sizes:
            inputs = torch.randn(1, size + text, weight.shape[1], dtype=weight.dtype, device=weight.device)
            _synchronise(weight.device)
            start = time.perf_counter()
            output = llm(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)
            _synchronise(weight.device)
            if repeat:  # the first round warms up
                seconds[size].append(time.perf_counter() - start)
            cached = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
            kv_bytes[size] = sum(part.numel() * part.element_size() for part in cached)
            del output, cached
    return [
        Latency(
            size,
            statistics.median(seconds[size]),
            kv_bytes[size],
            statistics.median(long / short for long, short in zip(seconds[size], seconds[32])),
            kv_bytes[size] / kv_bytes[32],
        )
        for size in sizes
    ]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_to_measure(name: str) -> PreTrainedModel:
    """The LLM to measure: with its weights, or Qwen2.5-7B's architecture with random ones, whose speed is the same."""
    device = default_device()
    if name != QWEN:
        return load_llm(name, device=device)[0]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(architecture(QWEN), dtype=default_dtype(device)).eval()


# ------------------------------------------------------------------------------------------------------- the report


def shorten(number: float) -> str:
    """1.7e12 as 1.70T; three digits."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            scaled = number / 10**power
            return f"{scaled:.{max(0, 2 - (scaled >= 10) - (scaled >= 100))}f}{unit}"
    return f"{number:.0f}"


def write_claims(found: list[Claim]) -> str:
    """The paper's figures beside ours, as Markdown."""
    rows = [[c.figure, f"{c.ours:.2f}{c.unit}", "yes" if c.reproduced else "no", c.reading] for c in found]
    return write_table(["paper", "ours", "same", "reading"], rows)


def write_costs(config: SparseWSIConfig, llm: PreTrainedConfig, patch: Cost | None) -> str:
    """All parts of all paths for every N, as Markdown."""
    head = ["N", "path", "part", "MACs, linear", "MACs, attention", "FLOPs without attention", "FLOPs"]
    rows = []
    for n in PATCHES:
        found = lines(config, llm, n, patch)
        for path in PATHS:
            parts = [(line.part, line.cost) for line in _of(found, path)]
            parts.append(("**total without patch encoder**", total(found, path)))
            for part, cost in parts:
                figures = (cost.linear, cost.attention, 2 * cost.linear, cost.flops)
                rows.append([f"{n:,}", path, part, *map(shorten, figures)])
    return write_table(head, rows)


def write_ratios(config: SparseWSIConfig, llm: PreTrainedConfig) -> str:
    """What the 32 tokens cost as a share of all N, as Markdown."""
    rows = []
    for n in PATCHES:
        found = lines(config, llm, n, None)
        sparse, full = total(found, PATHS[0]), total(found, PATHS[1])
        share, linear = sparse.flops / full.flops, sparse.linear / full.linear
        costs = [shorten(sparse.flops), shorten(full.flops)]
        rows.append([f"{n:,}", *costs, f"{100 * share:.2g} %", f"{100 * linear:.2g} %"])
    return write_table(["N", "sparse inference", "all-N inference", "share", "share without attention"], rows)


def write_latency(found: list[Latency]) -> str:
    """Measured prefill, as Markdown."""
    rows = []
    for row in found:
        times = [f"{1000 * row.seconds:.0f} ms", f"{row.seconds_ratio:.1f}"]
        rows.append([f"{row.tokens:,}", *times, f"{row.kv_bytes / 2**20:.1f} MiB", f"{row.kv_ratio:.1f}"])
    return write_table(["visual tokens", "prefill, median", "times 32 tokens'", "KV cache", "times 32 tokens'"], rows)


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--out", help="folder for flops.json and flops.md")
    add_flag(parser, "--model", help="the demo, for its config.json")
    parser.add_argument(
        "--latency", metavar="LLM", help=f"measure this LLM too, e.g. {SMOLLM2}; {QWEN}: random weights"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    full = SparseWSIConfig(llm=QWEN, encoder="conch", feature_dim=512, dim=512)
    systems = {
        f"{QWEN}, CONCH (ViT-B/16) features": (full, architecture(QWEN), vit_base()),
        f"the demo: {SMOLLM2}, EfficientNet-Lite0 features": (
            SparseWSIConfig.load(given.model),
            architecture(SMOLLM2),
            efficientnet_lite0(),
        ),
    }
    sections = ["## The paper's figures\n\n" + write_claims(found := claims())]
    record: dict = {"claims": [asdict(claim) for claim in found], "systems": {}}
    for name, (config, llm, patch) in systems.items():
        sections.append(f"## {name}\n\n{write_ratios(config, llm)}\n\n{write_costs(config, llm, patch)}")
        record["systems"][name] = {n: [asdict(line) for line in lines(config, llm, n, patch)] for n in PATCHES}
    if given.latency:
        measured = measure_latency(load_to_measure(given.latency), tuple(given.tokens), given.repeats)
        where = f"{given.latency}, {TEXT} text tokens, {default_device()}, {torch.get_num_threads()} threads"
        sections.append(f"## Measured: {where}\n\n{write_latency(measured)}")
        record["latency"] = {"where": where, "rows": [asdict(row) for row in measured]}
    write_json(given.out / "flops.json", record)
    write_text(given.out / "flops.md", "\n\n".join(sections) + "\n")
    print("\n\n".join(sections))


if __name__ == "__main__":
    run_command(main)
