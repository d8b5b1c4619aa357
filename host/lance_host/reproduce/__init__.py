"""`lance-host reproduce`: the paper's tables and figures, one module a claim.

`study` is what somebody asks for, `material` the networks and images that are there, `cells` the packages and
runs (each once), `findings` what came out beside what was published (`paper.toml`), `plots` the pictures.
"""
