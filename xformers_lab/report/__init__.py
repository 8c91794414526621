"""Rows in, pictures and words out: terminal tables (`table`) and one offline HTML file (`html`).

A row is the record of one cell of a comparison or a bench. What could not be computed stays in the report as a row
with its reason; it is never dropped.
"""
