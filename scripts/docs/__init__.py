"""Pages and figures of docs/ that follow from code or data.

Run as modules, from the root of the checkout; each writes into docs/, and a test says when a page is out of date:

- `families`: docs/models.md, from the registry of families;
- `composition`: the table of docs/composition.md, from the rows declared there, which the tests prove;
- `draw_concept`: the figures of docs/developer/concept.md, from the recorded head in docs/data.
"""
