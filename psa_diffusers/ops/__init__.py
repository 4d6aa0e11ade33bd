"""The operation: pyramid sparse attention on tensors. Nothing here knows of presets, models or diffusers.

In come q, k, v ``[B, H, L, D]`` as the model has them and a `Layout`, which is made once a resolution and says where
every token stands. Out comes the attention ``[B, H, L, D]``. On the way stand three things of `types`: the `Pyramid` of
pooled keys and values, the importance of every pair of blocks, and the `Schedule` of what is read at which factor.

    layout, orders    where tokens stand
    types             what the stages hand to each other, the numbers of the definition, what a backend must offer
    checks            refuses what does not fit
    reference         the stages in plain torch, on any device: what the others are held to
    triton            the same stages as Triton kernels, file by file under the same names
    training          as reference, with the two stages that carry gradients made for a GPU

Who calls chooses a backend, for each stage if need be (`psa_diffusers.attention` does); no backend asks for another.
"""
