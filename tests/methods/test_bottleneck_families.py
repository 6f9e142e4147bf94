"""What a site says is added to its sublayer is what the model adds there, in each family known by names."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers

import peft_engine as pe
from peft_engine.methods import bottleneck_sites
from peft_engine.methods.bottleneck_sites import POST_NORM, PRE_NORM, find

SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
ALONE = {
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 60},
    "biogpt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": 60,
    },
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 60,
    "word_embed_proj_dim": 32, "dropout": 0.0,
}  # fmt: skip
LLAMAS = ("llama", "gemma2", "gemma3_text", "vaultgemma", "glm4", "olmo2", "olmo3")
ALONE |= {family: LLAMA for family in LLAMAS}
SIDE_BY_SIDE = ("cohere", "phi", "gpt_neox", "gptj", "falcon", "falcon, new", "codegen")
ALONE |= {family: LLAMA for family in SIDE_BY_SIDE}
FALCON = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
ALONE |= {
    "falcon": FALCON,
    "falcon, new": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, one by one": FALCON | {"parallel_attn": False},
    "gpt_neox, one by one": LLAMA | {"use_parallel_residual": False},
}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 60}
ALONE |= {"gptj": GPTJ, "codegen": GPTJ}
ALONE |= {"opt": OPT, "opt, post-norm": OPT | {"do_layer_norm_before": False}}
MORE = {
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 32},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "whisper": {"max_source_positions": 16},
    "speech_to_text": {"conv_channels": 16, "max_source_positions": 32},
}
SOUND = {"whisper": (2, 80, 32), "speech_to_text": (2, 32, 80)}


def build(family):
    name = family.replace("blenderbot_", "blenderbot-").split(",")[0]
    torch.manual_seed(0)
    if family == "t5gemma":
        sizes = LLAMA | {"dropout_rate": 0.0}
        config = transformers.T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), vocab_size=60)
        config.decoder_start_token_id = 0
        return transformers.T5GemmaForConditionalGeneration(config).eval()
    config = transformers.AutoConfig.for_model(name, **(ALONE.get(family) or SIZES | MORE.get(family, {})))
    auto = transformers.AutoModelForCausalLM if family in ALONE else transformers.AutoModelForSeq2SeqLM
    auto = transformers.AutoModelForSpeechSeq2Seq if family in SOUND else auto
    return auto.from_config(config).eval()


def inputs(family):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    if family in SOUND:
        return {"input_features": torch.randn(SOUND[family], generator=generator), "labels": ids}
    return {"input_ids": ids, "labels": ids}


NORMS = ("t5gemma", "opt", "opt, post-norm", "gpt_neox, one by one", "falcon, one by one")


@pytest.mark.parametrize("family", [*POST_NORM, *PRE_NORM, *LLAMAS, *NORMS, *SIDE_BY_SIDE])
def test_the_sum_at_a_site_is_the_model_s(family):
    model = build(family)
    sites = find(model)
    assert len(sites) == (4 if family in ALONE else 10) and not any(site.generic for site in sites)
    seen = {}

    def watch(path, argument=0):
        def before(module, args, kwargs):
            given = args if args else [kwargs["hidden_states"]]
            seen[path, "in"] = given[argument]

        def after(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            seen[path, "out"] = output.clone()  # Falcon adds to it in place

        module = model.get_submodule(path)
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    layers = {site.holder.rpartition(".")[0] for site in sites}
    for path in {p for site in sites for p in (site.path, site.source)} | layers:
        watch(path)
    with torch.no_grad():
        model(**inputs(family))
        for layer in layers:
            mine = [site for site in sites if site.holder.rpartition(".")[0] == layer]
            if family in SIDE_BY_SIDE:
                first, second = mine
                assert seen[first.source, "in"] is seen[second.source, "in"]
                total = seen[first.source, "in"] + seen[first.path, "out"] + seen[second.path, "out"]
                torch.testing.assert_close(total, seen[layer, "out"])
                continue
            ends = [seen[site.source, "in"] for site in mine[1:]] + [seen[layer, "out"]]
            for site, end in zip(mine, ends, strict=True):
                total = seen[site.path, "out"] + seen[site.source, "in"].view_as(seen[site.path, "out"])
                total = total if site.norm is None else model.get_submodule(site.norm)(total)
                torch.testing.assert_close(total.view_as(end), end)


TERM = r"(\w+|self\.\w+\([\w.()]+\))"
SUM = re.compile(rf"\w+ = \(?{TERM} \+ {TERM}( \+ \w+)?\)?")


def layers_of_known_names():
    """(family, class, the lines of its forward that add or multiply) of those that are taken for known."""
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        classes = re.split(r"(?m)^(?=class |@|def )", file.read_text())  # to parse whole files takes long
        for source in (c for c in classes if "self.mlp =" in c and "    def forward" in c):
            (node,) = ast.parse(source).body
            methods = {f.name: f for f in getattr(node, "body", ()) if isinstance(f, ast.FunctionDef)}
            if not methods.keys() >= {"__init__", "forward"}:
                continue
            held = set(re.findall(r"self\.(\w+)\s*=", ast.get_source_segment(source, methods["__init__"])))
            norms = set(filter(bottleneck_sites._is_norm, held))
            known = [{name for part in parts for name in part} for parts in bottleneck_sites._BY_NAMES]
            known = [k for k in known if k <= held and norms == set(filter(bottleneck_sites._is_norm, k))]
            if "mlp" not in held or not known:
                continue
            statements = [s for s in ast.walk(methods["forward"]) if isinstance(s, (ast.Assign, ast.Return))]
            lines = [ast.unparse(s) for s in statements if s.value is not None]
            yield file.parent.name, node.name, [line for line in lines if re.search(r" [-+*/] ", line)]


def test_every_layer_of_known_names_adds_as_is_known():
    """In whatever transformers is there; what adds otherwise in a new one goes into _OTHER_SUMS."""
    found = list(layers_of_known_names())
    assert len(found) > 100
    others = set(bottleneck_sites._OTHER_SUMS)
    odd = [
        f"{family}, {kind}: {line}"
        for family, kind, lines in found
        if not {family, kind} & others
        for line in lines
        if not SUM.fullmatch(line)
    ]
    assert not odd, "\n".join(odd)


@pytest.mark.parametrize("family", ["Bloom", "Granite", "Doge", "MiniMax"])
def test_layers_of_known_names_and_other_sums_are_of_no_known_family(family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.device("meta"):
        sites = find(getattr(transformers, f"{family}ForCausalLM")(config))
    assert sites and all(site.generic for site in sites)


@pytest.mark.parametrize(
    "family",
    [
        "mbart",
        "blenderbot_small",
        "xglm",
        "gemma2",
        "olmo2",
        "t5gemma",
        "opt",
        "opt, post-norm",
        "cohere",
        "gpt_neox",
        "gptj",
    ],
)
def test_each_placement_trains(family):
    for preset in ("houlsby", "pfeiffer", "parallel"):
        model = build(family)
        pe.attach(model, getattr(pe.BottleneckConfig, preset)(width=4))
        model.train()
        model(**inputs(family)).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
