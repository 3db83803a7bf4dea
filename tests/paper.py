"""The models of the paper's table."""

# D, d_ff, blocks, heads, G, E, F of Antoniak et al., arXiv 2310.15961 (the authors' configuration files; Mini: their
# blog post). Where their files and their names disagree, at Base/64E/16, the naming rule E = G * k stands.
PAPER = {
    "Transformer-Mini": (256, 1024, 4, 4, 1, 1, 1024),
    "MoT-Mini/32E/16": (256, 1024, 4, 4, 32, 512, 64),
    "Transformer-Medium": (512, 2048, 8, 8, 1, 1, 2048),
    "MoT-Medium/8E": (512, 2048, 8, 8, 8, 8, 2048),
    "MoT-Medium/32E": (512, 2048, 8, 8, 32, 32, 2048),
    "MoT-Medium/32E/8": (512, 2048, 8, 8, 32, 256, 256),
    "MoT-Medium/32E/16": (512, 2048, 8, 8, 32, 512, 128),
    "MoT-Medium/32E/32": (512, 2048, 8, 8, 32, 1024, 64),
    "MoT-Medium/128E": (512, 2048, 8, 8, 128, 128, 2048),
    "Transformer-Base": (768, 3072, 12, 12, 1, 1, 3072),
    "MoT-Base/32E": (768, 3072, 12, 12, 32, 32, 3072),
    "MoT-Base/64E/16": (768, 3072, 12, 12, 64, 1024, 192),
}
