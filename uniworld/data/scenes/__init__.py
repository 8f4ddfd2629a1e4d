"""The world of the model `tiny`: still lifes drawn by program, and everything that can be told of them exactly.

graph.py       what a scene is made of: things, vocabularies, relations, the held-out rule
sampling.py    random scenes in which nothing overlaps or hides: `sample_scene`, `arrange`
render.py      `render(scene, size_px)`: the picture, and per pixel the thing, the depth and the normal
               camera, shapes and doll, solids (tables), surfaces (light), backdrops; tracing and shading in NumPy
               are the definition of what `csrc/scene_render.cpp` computes
styles.py      styles of the whole picture
perception.py  edge, depth, normal, pose, sketch, segmentation and detection targets, from contours and lines

What is said of scenes:
descriptions.py  things told apart by their attributes; wording.py puts them into English or Chinese, with the synonyms
                 of words_*.py and the templates of phrases_*.py and edit_phrases_*.py
captions.py, prompts.py, questions.py  captions, text-to-image prompts, questions with answers
edits.py         the nine kinds of edit, of the steps in edit_steps.py and edit_places.py; compositions.py two pictures
tasks.py         `make_item`: one training item of any task from a seed; perception_items.py those of perception
make.py          data sets of items: tar shards and the authors' layout

Floor coordinates: x from -1 (left) to 1 (right), z from 0 (near) to 1 (far). World units: X right, Y up, Z away.
"""
