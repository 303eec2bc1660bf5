"""The shapes that every side of a benchmark is measured at. Imports nothing, so that peers' runners can read it."""

# vocab 32000, width 288, 6 layers, 6 heads, ffn 768, tied: the 15M-parameter Llama shape.
SIZES = {
    "tiny": {
        "vocab_size": 32000,
        "width": 288,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 48,
        "mlp_width": 768,
    },
}
