"""One HTML page on what was measured of one or several models.

The page is a list of parts, a part a list of sections. A section is built by one function from
one kind of source: `sections.MODEL_SECTIONS` from one model, `comparison.SECTIONS` from several.
"""
