"""A blinded user study: pages for raters, their votes, and what the votes say.

`questions` chooses what is asked, `page` writes the folder that raters get and the key that stays behind, `serve` is
a small local server, `votes` reads and checks what came back, `tally` counts, `report` writes. The order of the
pictures is that of `blinding`, in Python and in page.js alike. `lego study` and `lego study-report` are the commands.
"""
