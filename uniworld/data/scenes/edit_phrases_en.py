"""English templates of edits and compositions.

Slots: {the}, {the_1}, {the_2} a thing of the picture, {a} a new one, {it} "it" or "them"; the others are words of
`words_en.py`. Sections that end in `_said` are no orders and are not joined to others.
"""

from uniworld.data.scenes.phrases import parse_phrases

EDIT_PHRASES = parse_phrases("""
# add
add {a}
add {a} to the picture
put {a} into the scene
place {a} in the scene
insert {a}
insert {a} into this image
draw {a} in the free space
include {a} in the picture
bring {a} into the scene
show {a} as well
# add_said
there should also be {a}
I would like to see {a} here too
can you add {a}?
one thing is missing: {a}
# add_side
add {a} {side}
put {a} {side}
place {a} {side}
insert {a} {side} of the scene
draw {a} {side} of the picture
add {a} somewhere {side}
# add_side_said
there should be {a} {side}
could you put {a} {side}?
# add_by
add {a} {relation} {the}
put {a} {relation} {the}
place {a} {relation} {the}
insert {a} {relation} {the}
draw {a} {relation} {the}
set {a} down {relation} {the}
# add_by_said
there should be {a} {relation} {the}
could you add {a} {relation} {the}?
I want {a} {relation} {the}

# remove
remove {the}
remove {the} from the picture
delete {the}
erase {the}
take {the} away
take {the} out of the scene
get rid of {the}
clear {the} from the image
wipe out {the}
make {the} disappear
make {the} vanish
cut {the} from the scene
leave out {the}
drop {the}
# remove_said
{the} should not be there
I do not want {the} in the picture
can you remove {the}?
the picture should be without {the}

# replace
replace {the} with {a}
replace {the} by {a}
swap {the} for {a}
exchange {the} for {a}
turn {the} into {a}
change {the} into {a}
change {the} to {a}
transform {the} into {a}
substitute {a} for {the}
put {a} in place of {the}
put {a} where {the} is
trade {the} for {a}
# replace_said
instead of {the} there should be {a}
{the} should become {a}
could you replace {the} with {a}?
I would rather see {a} than {the}

# colour
make {the} {colour}
paint {the} {colour}
color {the} {colour}
colour {the} {colour}
dye {the} {colour}
turn {the} {colour}
change {the} to {colour}
recolor {the} to {colour}
change the color of {the} to {colour}
change the colour of {the} to {colour}
set the color of {the} to {colour}
give {the} {a_colour} color
# colour_said
{the} should be {colour}
I want {the} to be {colour}
can you make {the} {colour}?
what if {the} were {colour}?

# material
make {the} {material}
turn {the} {material}
give {the} {a_material} surface
give {the} {a_material} finish
change the surface of {the} to {material}
change the finish of {the} to {material}
make the surface of {the} {material}
let {the} look {material}
# material_said
{the} should be {material}
{the} should have {a_material} surface
can you make {the} {material}?

# bigger
make {the} bigger
make {the} larger
enlarge {the}
scale {the} up
increase the size of {the}
let {the} grow
# bigger_said
{the} should be bigger
{the} is too small, make it larger
can {the} be bigger?
# smaller
make {the} smaller
shrink {the}
scale {the} down
reduce the size of {the}
decrease the size of {the}
let {the} shrink
# smaller_said
{the} should be smaller
{the} is too big, make it smaller
can {the} be smaller?
# size
make {the} {size}
let {the} be {size}
turn {the} into a {size} one
change {the} so that it is {size}
# size_said
{the} should be {size}
I want {the} to be {size}

# light left
let the light come from the left
light the scene from the left
move the lamp to the left
change the lighting so that it comes from the left
put the light source on the left
# light right
let the light come from the right
light the scene from the right
move the lamp to the right
change the lighting so that it comes from the right
put the light source on the right
# light front
let the light come from the front
light the scene from the front
move the lamp to the front
change the lighting so that it comes from the viewer's side
put the light source in front
# light warm
make the light warmer
make the lighting warm
use a warm light
give the scene a warm, golden light
light it like an evening sun
# light cool
make the light cooler
make the lighting cool
use a cool, bluish light
give the scene a cold light
shift the light towards blue
# light dim
dim the light
turn the light down
make the scene darker
use a dim light
lower the brightness of the light

# extract
extract {the}
extract {the} onto a white background
cut out {the} and place it on plain white
cut {the} out
isolate {the}
isolate {the} on white
show only {the} on a white background
keep only {the} and make everything else white
crop away everything except {the}, leaving white
separate {the} from its surroundings
remove everything but {the}
make a cutout of {the}
# extract_said
I need {the} alone on a white background
can you extract {the}?
I only want {the}, on plain white

# background
change the background to {background}
replace the background with {background}
set the scene {background_at}
move the scene {background_to}
move everything {background_to}
put these things {background_at}
use {background} as the background
swap the backdrop for {background}
make the background {background}
take the whole scene {background_to}
show the same things {background_at}
# background_said
the background should be {background}
what would this look like {background_at}?
can you set this {background_at}?
I want this picture {background_at}

# style
turn this into {style}
turn the picture into {style}
make it look like {style}
make it {style}
redraw this as {style}
render this as {style}
convert the image to {style}
change the style to {style_name}
transform it into {style}
repaint the scene as {style}
# style_said
I would like this as {style}
what would this look like as {style}?
can you make this {style}?
the picture should look like {style}

# move left
move {the} to the left
shift {the} to the left
push {the} to the left
slide {the} left
move {the} further left
# move right
move {the} to the right
shift {the} to the right
push {the} to the right
slide {the} right
move {the} further right
# move front
move {the} to the front
bring {the} closer
pull {the} forward
move {the} towards the viewer
move {the} nearer
# move back
move {the} to the back
move {the} further away
push {the} back
push {the} into the distance
move {the} away from the viewer
# move_by
move {the_1} {relation} {the_2}
put {the_1} {relation} {the_2}
place {the_1} {relation} {the_2}
shift {the_1} until it is {relation} {the_2}
# move_by_said
{the_1} should be {relation} {the_2}
can you move {the_1} {relation} {the_2}?
# swap
swap {the_1} and {the_2}
let {the_1} and {the_2} change places
exchange the positions of {the_1} and {the_2}
switch {the_1} and {the_2} around
# pose
make {the} {pose}
let {the} {pose}
have {the} {pose}
change the pose of {the}: it should {pose}
pose {the} so that it will {pose}
# pose_said
{the} should {pose}
can {the} {pose}?
I want {the} to {pose}

# hybrid
{first} and {second}
{first}, and {second}
{first}, then {second}
{first} and then {second}
{first}; also {second}
first {first}, then {second}
{first}. After that, {second}
do two things: {first} and {second}

# keep
keep the picture as it is
change nothing
do not change anything
leave everything as it is
return the image unchanged
give me the same picture again
draw this picture again
reproduce the image
repeat this image exactly
copy the picture
keep everything
show the same scene once more
# keep_said
everything should stay as it is
can you draw this once more?

# compose put
put {the} from the second picture into the first
add {the} of image 2 to image 1
insert {the} from picture 2 into picture 1
take {the} from the second image and place it in the first one
bring {the} from the second picture into the first scene
copy {the} of the second image into the first
combine the pictures: {the} of the second goes into the first
# compose replace
replace {the_1} in the first picture with {the_2} from the second
put {the_2} of image 2 in place of {the_1} in image 1
swap {the_1} of picture 1 for {the_2} of picture 2
exchange {the_1} in the first image for {the_2} from the second image
substitute {the_2} from picture 2 for {the_1} in picture 1
# compose background
put the things of the first picture on the background of the second
give the first picture the background of the second
use the background of image 2 for image 1
set the scene of picture 1 in the surroundings of picture 2
replace the background of the first image with that of the second
# compose colour
give {the_1} in the first picture the color of {the_2} in the second
paint {the_1} of image 1 in the colour of {the_2} of image 2
make {the_1} in picture 1 the same color as {the_2} in picture 2
copy the color of {the_2} in the second image to {the_1} in the first
# compose style
redraw the first picture in the style of the second
use the style of image 2 for image 1
make picture 1 look as if it was made like picture 2
transfer the style of the second image to the first
""")
