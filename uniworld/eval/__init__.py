"""Scores of a model, by program and without a judge model.

scenes_suite.py    held-out items of every column, what the model answers to them, kept on disk
scenes_score.py    one function a column: from an item and an answer to a verdict
scenes_reader.py   finds the things in a picture by drawing them: `read_scene`; scenes_search.py where to look
scenes_edits.py    whether an edit happened, by drawing the alternatives; scenes_maps.py perception maps;
                   scenes_answers.py short answers; scenes_compare.py pictures
scenes_table.py    columns, floors and sums; scenes_page.py the page of pictures; scenes_regions.py edits by their size
"""
