"""Oracle: transformers' PyTorch implementation, and numbers it gave for a real checkpoint."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, heads, tensor_files
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import (
    config_from_huggingface,
    from_pretrained,
    load_pretrained_scalar,
    read_config,
    save_pretrained,
    save_pretrained_scalar,
)

TIED = ModelConfig(
    vocab_size=37,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=6,
    mlp_width=40,
    max_length=64,
    norm_epsilon=1e-6,
)
# Grouped-query, a head width that is not width / heads, and another rotary base.
GROUPED = dataclasses.replace(TIED, num_kv_heads=2, head_dim=8, tied_embeddings=False, rope_theta=500.0)
TOKENS = np.random.default_rng(0).integers(0, 37, size=(3, 16))
MASK = np.arange(16)[None] >= np.array([[0], [3], [9]])

logits_of = jax.jit(decoder.logits, static_argnums=0)


def lively(config, seed):
    """Parameters whose every tensor matters to the logits, norms included."""
    leaves, tree = jax.tree.flatten(decoder.init_params(config, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(x + 0.2 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    )


def same_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("config", [TIED, GROUPED], ids=["tied", "grouped"])
def test_what_we_save_gives_the_same_logits_in_transformers(torch, config, tmp_path):
    import transformers

    params = lively(config, 1)
    save_pretrained(tmp_path, config, params, bos_id=1, eos_id=2, pad_id=0)
    model, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    positions = np.maximum(np.cumsum(MASK, axis=1) - 1, 0)
    with torch.no_grad():
        theirs = (
            model.float()
            .eval()(
                input_ids=torch.tensor(TOKENS),
                attention_mask=torch.tensor(MASK.astype(np.int64)),
                position_ids=torch.tensor(positions),
            )
            .logits.numpy()
        )
    ours = np.asarray(logits_of(config, params, TOKENS, MASK))
    assert np.abs(theirs[MASK]).max() > 1.0
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-4, rtol=0)
    same_trees(from_pretrained(tmp_path)[1], params)
    assert from_pretrained(tmp_path)[0] == config


def test_what_transformers_saves_in_shards_gives_the_same_logits_here(torch, tmp_path):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=37,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=40,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config, params = from_pretrained(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.tied_embeddings) == (1, 6, False)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(TOKENS)).logits.numpy()
    ours = logits_of(config, params, TOKENS, np.ones_like(MASK))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_a_reward_models_bias_and_offset_are_kept_beside_the_weights(tmp_path):
    params = {**lively(GROUPED, 2), "head": heads.init_scalar_head(GROUPED, jax.random.key(5))}
    params["head"]["bias"] = jnp.float32(-1.3)
    save_pretrained_scalar(tmp_path, GROUPED, params, offset=0.7)
    assert "score.bias" not in safetensors.numpy.load_file(tmp_path / "model.safetensors")
    config, back = load_pretrained_scalar(tmp_path)
    assert config == dataclasses.replace(GROUPED, tied_embeddings=True)
    del params["decoder"]["unembedding"]
    params["head"]["bias"] = np.float32(-1.3) - np.float32(0.7)
    same_trees(back, params)
    reconfigure(tmp_path, score_bias="much")
    refused(tmp_path, tmp_path / "config.json", "score_bias", "much", load=load_pretrained_scalar)


def test_the_real_checkpoint_gives_its_published_numbers(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    config, params = from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    last = expected["last_logits"]
    ids = np.array([last["ids"]])
    final = np.asarray(logits_of(config, params, ids, np.ones_like(ids, bool)))[0, -1]
    np.testing.assert_array_equal(np.argsort(-final)[:8], last["top_ids"])
    np.testing.assert_allclose(final[last["top_ids"]], last["top_logits"], atol=1e-4, rtol=0)

    stories = (
        (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    )
    encoded = [tokenizer(story.strip()).input_ids for story in stories[: len(expected["nll_per_token"])]]
    assert [len(row) for row in encoded] == [row["tokens"] for row in expected["nll_per_token"]]
    longest = max(map(len, encoded))
    mask = np.arange(longest)[None] < np.array([len(row) for row in encoded])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded)
    log_probs = jax.nn.log_softmax(logits_of(config, params, tokens, mask))[:, :-1]
    taken = -np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=2)[..., 0]
    means = [row[real].mean() for row, real in zip(taken, mask[:, 1:], strict=True)]
    np.testing.assert_allclose(
        means, [row["mean_nll"] for row in expected["nll_per_token"]], atol=2e-6, rtol=0
    )


def test_the_real_checkpoint_comes_back_bitwise(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    config, params = from_pretrained(folder)
    save_pretrained(tmp_path, config, params)
    original = safetensors.numpy.load_file(folder / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert original.keys() == written.keys()
    for name in original:
        assert original[name].tobytes() == written[name].tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_pretrained(path, GROUPED, lively(GROUPED, 1))
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refused(path, *words, load=from_pretrained):
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def rewrite(path, change):
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def reconfigure(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_half_precision_weights_are_widened(copy):
    exact = from_pretrained(copy)[1]["decoder"]["layers"]["query"]
    for dtype in (np.float16, jnp.bfloat16):
        rewrite(copy, lambda t, d=dtype: t.update({k: v.astype(d) for k, v in t.items()}))
        loaded = from_pretrained(copy)[1]["decoder"]["layers"]["query"]
        assert loaded.dtype == np.float32
        np.testing.assert_allclose(loaded, exact, rtol=1e-2, atol=1e-6)


def test_missing_files(copy, tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "exists")
    refused("gs://bucket/gpt2", "gs://bucket/gpt2 is a URL", "a directory is needed", "gcsfuse")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, copy / "pytorch_model.bin", "pickled", "safetensors")
    (copy / "pytorch_model.bin").unlink()
    refused(copy, copy, "no weights", "model.safetensors")
    (copy / "config.json").write_text("{not json")
    refused(copy, copy / "config.json", "JSON")
    (copy / "config.json").unlink()
    refused(copy, copy / "config.json", "missing")


def test_an_index_that_names_a_missing_shard(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, copy / "model-00002-of-00002.safetensors", "missing")
    (copy / "model.safetensors.index.json").write_text("{}")
    refused(copy, copy / "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file(copy, kept):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(copy, file, "not a whole safetensors file")


def test_tensors_that_do_not_belong(copy):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda t: t.update({name: t[name][:, :-1].copy()}))
    refused(copy, copy / "model.safetensors", name, "(40, 23)", "(40, 24)")
    rewrite(copy, lambda t: t.pop(name))
    refused(copy, copy, name)
    rewrite(copy, lambda t: t.update({name: np.zeros((40, 24), np.int8)}))
    refused(copy, copy / "model.safetensors", name, "I8")
    rewrite(copy, lambda t: t.update({name: np.zeros((40, 24), np.float32), "model.layers.7.x": np.zeros(1)}))
    refused(copy, copy / "model.safetensors", "model.layers.7.x")


def test_a_head_that_config_says_is_tied_but_differs(copy):
    reconfigure(copy, tie_word_embeddings=True)
    refused(copy, "lm_head.weight", "tie_word_embeddings")
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert from_pretrained(copy)[0].tied_embeddings


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "wide"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_named_with_its_file(copy, changes, word):
    reconfigure(copy, **changes)
    refused(copy, copy / "config.json", word)


def test_other_weights_have_another_fingerprint(saved, copy, tmp_path):
    assert tensor_files.fingerprint(copy) == tensor_files.fingerprint(saved) is not None
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    name = sorted(tensors)[-1]
    safetensors.numpy.save_file({**tensors, name: tensors[name] + 1}, copy / "model.safetensors")
    assert tensor_files.fingerprint(copy) != tensor_files.fingerprint(saved)
    assert tensor_files.fingerprint(tmp_path / "missing") is None


def test_a_causal_model_is_not_a_reward_model(saved):
    refused(saved, saved / "config.json", "LlamaForSequenceClassification", load=load_pretrained_scalar)


def test_arrays_are_read_onto_their_devices_a_slice_at_a_time(saved, monkeypatch):
    config, whole = from_pretrained(saved)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    names = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}

    def on_mesh(axes):
        return jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*(names.get(name) for name in axes))
        )

    is_axes = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    shardings = jax.tree.map(on_mesh, decoder.logical_axes(read_config(saved)), is_leaf=is_axes)
    sizes = {}
    read = tensor_files.TensorFiles.read

    def recorded(files, name, index):
        block = read(files, name, index)
        sizes[name] = sizes.get(name, 0) + block.size
        return block

    monkeypatch.setattr(tensor_files.TensorFiles, "read", recorded)
    _, params = from_pretrained(saved, shardings=shardings)
    same_trees(params, whole)
    jax.tree.map(lambda array, wanted: np.testing.assert_(array.sharding == wanted), params, shardings)
    # Four devices share no slice of a kernel and two hold the same: each slice was read once.
    assert sizes["model.layers.1.mlp.up_proj.weight"] == 40 * 24
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    _, params = from_pretrained(saved, shardings=one)
    same_trees(params, whole)
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(params))


def test_weights_rounded_to_half_precision_come_back_bitwise(copy, tmp_path):
    for dtype, kind in (("bfloat16", jnp.bfloat16), ("float16", np.float16)):
        config, params = from_pretrained(copy)
        save_pretrained(tmp_path / dtype, config, params, dtype=dtype)
        written = safetensors.numpy.load_file(tmp_path / dtype / "model.safetensors")
        assert {value.dtype for value in written.values()} == {np.dtype(kind)}
        config, rounded = from_pretrained(tmp_path / dtype)
        halves = jax.tree.map(lambda x, kind=kind: np.asarray(x).astype(kind).astype(np.float32), params)
        same_trees(halves, rounded)
        save_pretrained(tmp_path / "again", config, rounded, dtype=dtype)
        names = ("model.safetensors", "config.json")
        assert all(
            (tmp_path / dtype / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names
        )


def test_a_save_leaves_nothing_of_the_one_before(saved, tmp_path):
    config, params = from_pretrained(saved)
    for size, files in ((20_000, 3), (10**9, 1), (30_000, 2)):
        save_pretrained(tmp_path, config, params, max_shard_bytes=size)
        weights = sorted(tmp_path.glob("*.safetensors"))
        assert len(weights) == files and all(file.stat().st_size < size + 4000 for file in weights)
        assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
        assert not list(tmp_path.glob("*.partial"))
        same_trees(from_pretrained(tmp_path)[1], params)
    for options, word in (({"max_shard_bytes": 0}, "max_shard_bytes"), ({"dtype": "int8"}, "int8")):
        with pytest.raises(InputError, match=word):
            save_pretrained(tmp_path, config, params, **options)
    same_trees(from_pretrained(tmp_path)[1], params)


def test_a_name_that_is_no_directory_and_cannot_be_fetched(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    refused("someone/some-model", "someone/some-model", "neither a directory nor", "hf download")
    refused("runs/with/too/many", "runs/with/too/many", "missing", "owner/name")


def test_tensors_without_the_models_prefix(copy):
    rewrite(copy, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    same_trees(from_pretrained(copy)[1], lively(GROUPED, 1))


def test_older_spelling_of_the_rotary_base():
    fields = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "rope_theta": 5e5,
        "rope_scaling": None,
    }
    config = config_from_huggingface(fields)
    assert (config.rope_theta, config.num_kv_heads, config.head_dim) == (5e5, 2, 4)
