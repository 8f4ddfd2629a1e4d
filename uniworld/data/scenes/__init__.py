"""The world of the model `tiny`: still lifes drawn by program, and everything that can be told of them exactly.

graph.py       what a scene is made of: things, vocabularies, relations, the held-out rule
sampling.py    random scenes in which nothing overlaps or hides: `sample_scene`, `arrange`
render.py      `render(scene, size_px)`: the picture, and per pixel the thing, the depth and the normal
               camera, shapes and doll, solids (tables), surfaces (light), backdrops; tracing and shading in NumPy
               are the definition of what `csrc/scene_render.cpp` computes
styles.py      styles of the whole picture
perception.py  edge, depth, normal, pose, sketch, segmentation and detection targets, from contours and lines

Floor coordinates: x from -1 (left) to 1 (right), z from 0 (near) to 1 (far). World units: X right, Y up, Z away.
"""
