"""The denoiser families: one file each, and the registry that finds them.

A family's file holds a row of facts (`Family`: classes, attentions, grid, sections) and, where its attention is its
own, a processor that says how that projects, rotates and puts out. `families` imports them all, which registers them.
`registry` knows no processor: processors import it.
"""
