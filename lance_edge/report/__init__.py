"""What people look at: runs and benchmarks read from their folders, as figures, tables and one page.

`folders` finds runs and `views` reads them; `learning`, `time_use`, `memory_use`, `heat`, `results`,
`findings`, `notices` and `provenance` say what is shown, `content` puts it in order, `page` writes it down.
Drawing is left to whoever has a pen: the workstation has matplotlib, the device a few lines of its own.
"""
