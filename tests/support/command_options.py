"""Options with which the command makes a video of a tiny pipeline, dense and sparse."""

SIZE = ["--width", "64", "--height", "64", "--num_frames", "9", "--num_inference_steps", "3"]
SMALL = [
    "--attention_preset",
    "psa_balanced",
    "--set",
    "block_size.m=16",
    "block_size.n=16",
    "block_size.tile_n=16",
    "warmup_steps=1",
]
