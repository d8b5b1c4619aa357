"""The workstation side: calibrates a network once and compiles its training graphs into a package."""
