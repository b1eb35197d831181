"""The report room: a run folder in, `report.html` and `README.md` (the model card) out. Knows files, never a model.

page.py writes the page, card.py the card; record.py reads the folder, words.py says numbers, charts.py draws.
"""
