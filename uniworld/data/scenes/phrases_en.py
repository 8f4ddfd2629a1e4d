"""English templates of captions, prompts, questions and perception tasks.

Slots as in `edit_phrases_en.py`; {caption}, {parts} and {answer} are whole phrases.
"""

from uniworld.data.scenes.phrases import parse_phrases

PHRASES = parse_phrases("""
# prompt single object
{style} of {a}
{a}
an image showing {a}
draw {a}
please draw {a}
generate a picture of {a}
# prompt two objects
{style} of {a_1} and {a_2}
{a_1} and {a_2}
{a_1} with {a_2}
a picture with {a_1} and {a_2} in it
draw {a_1} and {a_2}
generate an image of {a_1} next to {a_2}
# prompt counting
{style} of {n_things}
{n_things}
a picture of exactly {n_things}
draw {n_things}
generate an image with {n_things}
an image in which there are {n_things}
# prompt colors
{style} of {a}
{a}
a picture of {a}
draw {a}
an image of {a}
create a picture that shows {a}
# prompt position
{style} of {a_1} {relation} {a_2}
{a_1} {relation} {a_2}
draw {a_1} {relation} {a_2}
a picture of {a_1} that is {relation} {a_2}
an image in which {a_1} is {relation} {a_2}
generate {a_1} placed {relation} {a_2}
# prompt attribute binding
{style} of {a_1} and {a_2}
{a_1} and {a_2}
a picture showing {a_1} and {a_2}
draw {a_1} together with {a_2}
{a_1} beside {a_2}
generate an image of {a_1} and {a_2}
# prompt caption
{caption}
draw this: {caption}
generate an image: {caption}
a picture of the following scene: {caption}
please create this picture: {caption}
# prompt_background
{prompt}, {background_at}
{prompt} {background_at}
{prompt}, with {background} as the background

# caption short
{style} of {parts}
{style} with {parts}
{style} of {parts} {background_at}
{style} showing {parts}
{parts} {background_at}
# caption long
{style} of {parts} {background_at}. {places} {light}
{style} {background_at}, with {parts}. {places} {light}
{style} showing {parts}. The scene is set {background_at}. {places} {light}
{style} in which {there_is} {parts} {background_at}. {places} {light}
# caption place
{the_1} is {relation} {the_2}.
{the_1} stands {relation} {the_2}.
{the_1} can be seen {relation} {the_2}.
# ask caption
describe this picture
describe the image briefly
what does this picture show?
what do you see?
give a short caption for this image
write a caption
tell me what is in the picture
# ask caption long
describe this picture in detail
give a detailed description of the image
what does the picture show, and where are the things?
describe everything that you see
write a long caption

# ask colour
what color is {the}?
what colour is {the}?
which color does {the} have?
tell me the color of {the}
what is the color of {the}?
{the} is of which color?
# ask colour next
and {the}?
what about {the}?
and what color is {the}?
# ask shape
what shape is {the}?
which shape does {the} have?
what kind of shape is {the}?
tell me the shape of {the}
what is the shape of {the}?
# ask count
how many {things} are there?
how many {things} are in the picture?
how many {things} can you see?
count the {things}
what is the number of {things}?
give me the number of {things} in the image
# ask exists
is there {a} in the picture?
is there {a}?
can you see {a}?
do you see {a} here?
does the picture contain {a}?
does the image show {a}?
# ask relation
is {the_1} {relation} {the_2}?
does {the_1} stand {relation} {the_2}?
is it true that {the_1} is {relation} {the_2}?
would you say that {the_1} is {relation} {the_2}?
# ask what_at
what is {relation} {the}?
which thing is {relation} {the}?
what stands {relation} {the}?
what can you see {relation} {the}?
# ask where
where is {the}?
where in the picture is {the}?
on which side is {the}?
in which part of the image is {the}?
# ask material
what does the surface of {the} look like?
what kind of surface does {the} have?
which finish does {the} have?
what is the surface of {the}?
how would you describe the surface of {the}?
# ask background
what is the background?
where was this picture taken?
what kind of place is this?
in what setting are the things?
which place is shown in the background?
# ask style
what style is this picture in?
what kind of picture is this?
which style does the image have?
is this a photo, or what else?
# ask bigger
which is bigger, {the_1} or {the_2}?
which one is larger: {the_1} or {the_2}?
what is bigger, {the_1} or {the_2}?
# ask smaller
which is smaller, {the_1} or {the_2}?
which one is smaller: {the_1} or {the_2}?
what is smaller, {the_1} or {the_2}?
# ask is_bigger
is {the_1} bigger than {the_2}?
is {the_1} larger than {the_2}?
is {the_2} smaller than {the_1}?
# ask same_colour
do {the_1} and {the_2} have the same color?
are {the_1} and {the_2} of the same colour?
is {the_1} the same color as {the_2}?
# ask more
are there more {things_1} than {things_2}?
does the picture show more {things_1} than {things_2}?
do you see more {things_1} than {things_2}?

# perceive canny
Generate a Canny edge map for this image.
show the Canny edges of this picture
detect the edges with Canny
draw the edge map of this image
# perceive depth
Generate a depth map for this image.
show how far away everything is
estimate the depth of this picture
draw a depth map of this scene
# perceive hed
Generate a HED boundary map for this image.
show the soft HED boundaries of this picture
draw the HED edges of this image
detect the boundaries with HED
# perceive mlsd
Generate an MLSD straight-line map for this image.
show the straight lines of this picture
detect the line segments with MLSD
draw the straight lines that MLSD finds
# perceive normal
Generate a surface normal map for this image.
show the surface normals of this picture
estimate the normals of this scene
draw a normal map of this image
# perceive pose
Generate an OpenPose human pose map for this image.
show the pose of the figure as OpenPose draws it
detect the skeleton of the doll
draw the pose map of this image
# perceive sketch
Transform this image into a hand-drawn sketch.
show the outlines of this picture as a sketch
draw a line sketch of this image
sketch the contours of this scene
# perceive segment
Segment {the} from the background.
segment {the}
show the mask of {the}
draw a segmentation mask of {the}
mark the region of {the}
# perceive detect
Detect {the} in this image and draw its bounding box.
draw a box around {the}
detect {the}
mark {the} with a bounding box
find {the} and put a box around it
# perceive segment main
Segment the main object from the background.
segment the object
show the mask of the thing in this picture
# perceive segment all
segment all things from the background
show the mask of everything in the foreground
# perceive detect main
Detect the main object in this image and draw its bounding box.
draw a box around the object
# perceive detect all
detect all things and draw their bounding boxes
draw a box around every thing

# draw canny
Generate an image from this Canny edge map: {caption}
turn this edge map into {caption}
follow these Canny edges and draw {caption}
# draw depth
Generate an image from this depth map: {caption}
use this depth map to draw {caption}
with these depths, make {caption}
# draw hed
Generate an image from this HED boundary map: {caption}
turn these HED boundaries into {caption}
follow this boundary map and draw {caption}
# draw mlsd
Generate an image from this MLSD straight-line map: {caption}
use these straight lines to draw {caption}
# draw normal
Generate an image from this surface normal map: {caption}
turn this normal map into {caption}
use these surface normals to draw {caption}
# draw pose
Generate an image from this OpenPose human pose map: {caption}
use this pose to draw {caption}
# draw sketch
Generate an image from this sketch: {caption}
color this sketch: {caption}
finish this drawing as {caption}
""")
