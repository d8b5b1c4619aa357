"""What people look at: runs and benchmarks read from their folders, as figures, tables and one page.

`views` reads, `figures_*` and `results` say what is shown, `page` writes it down.  Drawing is left to whoever
has a pen: the workstation has matplotlib, the device a few lines of its own.
"""
