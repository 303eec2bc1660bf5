"""Oracles: additions worked out in float64, and what PEFT itself wrote and computed (make_peft.py)."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.errors import InputError
from rlhf_jax.models import cache, decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import config_from_huggingface
from rlhf_jax.models.huggingface import from_pretrained, save_pretrained
from rlhf_jax.models.lora import (
    LoraConfig,
    adapter_axes,
    init_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    with_adapter,
)

HERE = pathlib.Path(__file__).parent
CONFIG = ModelConfig(
    vocab_size=19,
    width=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=10,
    max_length=24,
    qkv_bias=True,
    output_bias=True,
)
LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "value", "down"))
TOKENS = np.random.default_rng(0).integers(0, 19, size=(2, 9))
REAL = np.ones((2, 9), bool)

logits_of = jax.jit(decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def base():
    return decoder.init_params(CONFIG, jax.random.key(0))


def trained(config=CONFIG, lora=LORA, seed=1):
    """An adapter whose every array matters."""
    rng = np.random.default_rng(seed)
    fresh = init_lora(config, lora, jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(x + 0.2 * rng.normal(size=x.shape), jnp.float32), fresh)


def same_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_fresh_adapter_changes_nothing_and_is_as_said(base):
    adapter = init_lora(CONFIG, LORA, jax.random.key(7))
    np.testing.assert_array_equal(
        logits_of(CONFIG, with_adapter(base, adapter, LORA), TOKENS, REAL),
        logits_of(CONFIG, base, TOKENS, REAL),
    )
    assert adapter["down"]["in"].shape == (2, 10, 3) and adapter["down"]["out"].shape == (2, 3, 12)
    wide = init_lora(dataclasses.replace(CONFIG, width=400), LORA, jax.random.key(7))["query"]["in"]
    assert 0.0495 < np.abs(wide).max() <= 0.05
    np.testing.assert_allclose(np.std(wide), 0.05 / np.sqrt(3), rtol=0.05)
    assert not np.array_equal(wide[0], wide[1])
    again = init_lora(CONFIG, LORA, jax.random.key(7))
    same_trees(adapter, again)
    few = dataclasses.replace(LORA, targets=("value",))
    same_trees(init_lora(CONFIG, few, jax.random.key(7))["value"], adapter["value"])


def test_merged_kernels_against_float64_and_the_view_against_merged(base):
    adapter = trained()
    merged = merge_adapter(base, adapter, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for name, kernel in merged["decoder"]["layers"].items():
        expected = np.asarray(base["decoder"]["layers"][name], np.float64)
        for layer in range(2 if name in adapter else 0):
            pair = {k: np.asarray(v[layer], np.float64) for k, v in adapter[name].items()}
            expected[layer] += 5.0 / 3.0 * pair["in"] @ pair["out"]
        np.testing.assert_allclose(kernel, expected, atol=1e-6, err_msg=name)
    view = with_adapter(base, adapter, LORA)
    for name, kernel in base["decoder"]["layers"].items():
        assert view["decoder"]["layers"][name] is kernel
    plain, seen = (np.asarray(logits_of(CONFIG, p, TOKENS, REAL)) for p in (base, view))
    np.testing.assert_allclose(seen, logits_of(CONFIG, merged, TOKENS, REAL), atol=1e-5)
    assert np.abs(seen - plain).max() > 0.05


def test_one_base_serves_four_roles(base):
    """Policy and value have adapters, the reference is the base: gradients reach what each owns and nothing else."""
    policy, value = trained(seed=1), trained(seed=2)
    head = heads.init_scalar_head(CONFIG, jax.random.key(3))

    def objective(owned, base):
        states = decoder.hidden_states(CONFIG, with_adapter(base, owned["value"], LORA), TOKENS, REAL)
        values = heads.scalar_head(owned["head"], states)
        logits = decoder.logits(CONFIG, with_adapter(base, owned["policy"], LORA), TOKENS, REAL)
        reference = decoder.logits(CONFIG, base, TOKENS, REAL)
        return jnp.mean(jnp.square(logits - reference)) + jnp.mean(jnp.square(values - 1.0))

    owned = {"policy": policy, "value": value, "head": head}
    gradient = jax.jit(jax.grad(objective))(owned, base)
    assert jax.tree.structure(gradient) == jax.tree.structure(owned)

    def merged_objective(policy_kernels, base):
        layers = base["decoder"]["layers"] | policy_kernels
        logits = decoder.logits(CONFIG, {"decoder": {**base["decoder"], "layers": layers}}, TOKENS, REAL)
        return jnp.mean(jnp.square(logits - decoder.logits(CONFIG, base, TOKENS, REAL)))

    merged = merge_adapter(base, policy, LORA)["decoder"]["layers"]
    kernels = jax.jit(jax.grad(merged_objective))({name: merged[name] for name in policy}, base)
    for name, pair in policy.items():  # d/d in = (alpha / r) dW out^T, d/d out = (alpha / r) in^T dW
        slope = np.asarray(kernels[name], np.float64) * 5.0 / 3.0
        for layer in range(2):
            inwards, outwards = (np.asarray(pair[k][layer], np.float64) for k in ("in", "out"))
            got = {k: np.asarray(v[layer]) for k, v in gradient["policy"][name].items()}
            np.testing.assert_allclose(got["in"], slope[layer] @ outwards.T, atol=1e-5)
            np.testing.assert_allclose(got["out"], inwards.T @ slope[layer], atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gradient))


def test_decoding_reads_adapters_too(base):
    view = with_adapter(base, trained(), LORA)
    expected = np.asarray(jax.jit(decoder.hidden_states, static_argnums=0)(CONFIG, view, TOKENS, REAL))
    weights = cache.decoding_weights(CONFIG, view)
    prefill = jax.jit(cache.prefill, static_argnums=(0, 4))
    hidden, kept = prefill(CONFIG, weights, TOKENS[:, :8], REAL[:, :8], 9)
    np.testing.assert_allclose(hidden, expected[:, 7], atol=1e-5)
    eight = np.full(2, 8, np.int32)
    step = jax.jit(cache.decode_step, static_argnums=0)
    hidden, _ = step(CONFIG, weights, kept, TOKENS[:, 8], eight, jnp.int32(8), REAL)
    np.testing.assert_allclose(hidden, expected[:, 8], atol=1e-5)


def test_every_axis_of_an_adapter_has_a_name():
    adapter = trained()
    axes = adapter_axes(CONFIG, LORA)
    sizes = {"layers": 2, "embed": 12, "heads": 16, "kv_heads": 8, "mlp": 10, "lora_rank": 3}
    is_axes = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    named = jax.tree.map(lambda spec: tuple(sizes[name] for name in spec), axes, is_leaf=is_axes)
    assert named == jax.tree.map(lambda x: x.shape, adapter)


def fill(shapes):
    spec = importlib.util.spec_from_file_location("make_peft", HERE / "make_peft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.fill(shapes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_peft_wrote_gives_pefts_logits(family, tmp_path):
    golden = json.loads((HERE / "peft.json").read_text())[family]
    make, tensors = fill(golden["shapes"])
    architecture = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    config = config_from_huggingface(
        make.MODELS[family] | {"model_type": family, "architectures": [architecture]}
    )
    save_pretrained(tmp_path / "base", config, decoder.init_params(config, jax.random.key(0)))
    file = tmp_path / "base" / "model.safetensors"
    shapes = {name: value.shape for name, value in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(make.fill(shapes), file)
    _, base = from_pretrained(tmp_path / "base")

    adapted = tmp_path / "adapter"
    adapted.mkdir()
    (adapted / "adapter_config.json").write_text(json.dumps(golden["fields"]))
    safetensors.numpy.save_file(tensors, adapted / "adapter_model.safetensors")
    lora, adapter, head = load_adapter(adapted, config)
    assert head is None and (lora.rank, lora.alpha) == (2, 3)
    ids = np.array(make.IDS)
    ours = logits_of(config, with_adapter(base, adapter, lora), ids, np.ones_like(ids, bool))
    np.testing.assert_allclose(ours[0], golden["logits"], atol=1e-5)

    save_adapter(tmp_path / "ours", config, adapter, lora, base_model="base")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written) <= set(golden["fields"])
    again, back, _ = load_adapter(tmp_path / "ours", config)
    assert again == lora
    ours_again = logits_of(config, with_adapter(base, back, lora), ids, np.ones_like(ids, bool))
    if family == "llama":
        same_trees(back, adapter)
        ours_written = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
        assert ours_written.keys() == tensors.keys()
        for name in tensors:
            assert ours_written[name].tobytes() == tensors[name].tobytes(), name
        for name in ("r", "lora_alpha", "bias", "peft_type", "task_type", "fan_in_fan_out", "use_dora"):
            assert written.get(name, False) == golden["fields"][name], name
    else:  # three additions of rank 2 in one of rank 6
        assert written["rank_pattern"] == {"attn.c_attn": 6} and written["alpha_pattern"] == {
            "attn.c_attn": 9
        }
        np.testing.assert_allclose(ours_again[0], golden["logits"], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_adapter_and_a_head_come_back(family, tmp_path):
    neox = {"norm": "layer", "gated_mlp": False, "mlp_bias": True, "num_kv_heads": 4, "head_dim": 3}
    neox |= {"rotary_fraction": 0.7}
    config = dataclasses.replace(CONFIG, family=family, **(neox if family == "gpt_neox" else {}))
    adapter = trained(config)
    head = heads.init_scalar_head(config, jax.random.key(1)) | {"bias": jnp.float32(0.3)}
    save_adapter(tmp_path, config, adapter, LORA, base_model="x", head=head)
    lora, back, back_head = load_adapter(tmp_path, config)
    assert (lora.rank, lora.alpha) == (3, 5.0) and set(LORA.targets) <= set(lora.targets)
    same_trees(back_head, head)
    # Where query, key and value share a tensor the key comes back, too, with an addition that is 0.
    products = {
        n: np.einsum("lir,lro->lio", *(np.asarray(p[k]) for k in ("in", "out"))) for n, p in back.items()
    }
    for name in products.keys() | adapter.keys():
        expected = np.zeros_like(products[name])
        if name in adapter:
            expected = np.einsum("lir,lro->lio", *(np.asarray(adapter[name][k]) for k in ("in", "out")))
        np.testing.assert_allclose(products[name], expected, atol=1e-6, err_msg=name)


@pytest.fixture
def saved(tmp_path):
    save_adapter(tmp_path, CONFIG, trained(), LORA, base_model="base")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ("adapter_config.json", "use_dora", "True")),
        ({"peft_type": "IA3"}, ("peft_type", "IA3", "LORA")),
        ({"r": 4}, ("lora_A", "(3, 12)", "(4, 12)")),
        ({"r": None}, ("adapter_config.json", "rank", "None")),
        ({"alpha_pattern": {"q_proj": 9}}, ("alpha_pattern", "self_attn.q_proj", "3.0")),
        ({"rank_pattern": {"layers.0.q_proj": 9}}, ("rank_pattern", "layers.0.q_proj")),
        ({"rank_pattern": [9]}, ("rank_pattern", "[9]")),
        ({"alpha_pattern": {"q_proj": "much"}}, ("alpha_pattern", "much")),
    ],
)
def test_an_adapter_config_that_cannot_be_used(saved, changes, words):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(saved, *words)


def refused(directory, *words):
    with pytest.raises(InputError) as error:
        load_adapter(directory, CONFIG)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_adapter_files_that_cannot_be_used(saved):
    file = saved / "adapter_model.safetensors"
    whole = safetensors.numpy.load_file(file)
    some = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    safetensors.numpy.save_file({k: v for k, v in whole.items() if k != some}, file)
    refused(saved, some)
    safetensors.numpy.save_file(whole | {"base_model.model.x": np.zeros(1, np.float32)}, file)
    refused(saved, str(file), "base_model.model.x", "no place")
    safetensors.numpy.save_file({"other": np.zeros(1, np.float32)}, file)
    refused(saved, str(saved), "no kernel of this model")
    file.rename(saved / "adapter_model.bin")
    refused(saved, "adapter_model.bin", "pickled")
    (saved / "adapter_model.bin").unlink()
    refused(saved, "adapter_model.safetensors")
    (saved / "adapter_config.json").unlink()
    refused(saved, "adapter_config.json", "missing")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"targets": ()}, "targets"),
        ({"targets": ("query", "q_proj")}, "q_proj"),
        ({"targets": ("query", "query")}, "targets"),
    ],
)
def test_settings_out_of_range_are_named(changes, word):
    with pytest.raises(InputError, match=word):
        dataclasses.replace(LORA, **changes)


def test_a_model_that_its_family_cannot_say_gets_no_files(tmp_path):
    strange = dataclasses.replace(CONFIG, family="gpt2")
    with pytest.raises(InputError, match="family gpt2"):
        save_adapter(tmp_path / "x", strange, trained(), LORA, base_model="base")
    assert not (tmp_path / "x").exists()


def test_a_target_that_the_model_does_not_have():
    plain = dataclasses.replace(CONFIG, gated_mlp=False)
    with pytest.raises(InputError, match="gate.*take it out"):
        init_lora(plain, LoraConfig(rank=2, alpha=1.0, targets=("gate",)), jax.random.key(0))
