"""`lance-host report`: the page, its data and its pictures, drawn by matplotlib.

matplotlib and not plotly: a page of inlined SVG is some hundred kilobytes where plotly's script alone is four
megabytes, it shows without running any script, and PNG files need no browser (plotly's do).  What is lost is
hovering over points: `--csv` gives the numbers.
"""
