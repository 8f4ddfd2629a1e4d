"""English words for what is in a scene. Of several, the first is the canonical one, used in answers."""

SHAPES = {  # singular, plural
    "ball": (("ball", "balls"), ("sphere", "spheres")),
    "cube": (("cube", "cubes"), ("box", "boxes"), ("block", "blocks")),
    "cylinder": (("cylinder", "cylinders"), ("drum", "drums")),
    "cone": (("cone", "cones"),),
    "torus": (("ring", "rings"), ("torus", "tori"), ("donut", "donuts")),
    "pyramid": (("pyramid", "pyramids"),),
    "doll": (("doll", "dolls"), ("mannequin", "mannequins"), ("puppet", "puppets")),
}
THING = (("thing", "things"), ("object", "objects"))
COLOURS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
    "black": ("black",),
}
MATERIALS = {  # before a noun
    "matte": ("matte",),
    "glossy": ("glossy", "shiny"),
    "metal": ("metal", "metallic"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka-dot"),
}
FINISHES = {  # after a verb, and before "surface"
    "matte": ("matte",),
    "glossy": ("glossy", "shiny"),
    "metal": ("metallic",),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
}
SIZES = {"small": ("small", "little"), "medium": ("medium-sized",), "large": ("large", "big")}
SIZES_SAID = {"small": ("small",), "medium": ("medium-sized",), "large": ("large", "big")}
NUMBERS = ("no", "one", "two", "three", "four", "five")

BACKGROUNDS = {
    "studio": ("a studio", "a photo studio"),
    "wood table": ("a wooden table", "a table of wood"),
    "beach": ("a beach", "a sandy beach"),
    "meadow": ("a meadow", "a green meadow"),
    "night": ("a night sky", "the night"),
    "tiles": ("a tiled floor", "a floor of tiles"),
    "snow": ("snow", "a snowy landscape"),
    "desert": ("a desert", "the desert"),
    "plain": ("plain white", "a white background"),
}
BACKGROUND_NAMES = {
    "studio": ("studio",),
    "wood table": ("wooden table",),
    "beach": ("beach",),
    "meadow": ("meadow",),
    "night": ("night sky",),
    "tiles": ("tiled floor",),
    "snow": ("snow",),
    "desert": ("desert",),
}
BACKGROUNDS_AT = {
    "studio": ("in a studio", "in a photo studio"),
    "wood table": ("on a wooden table", "on a table of wood"),
    "beach": ("on a beach", "at the beach"),
    "meadow": ("in a meadow", "on a green meadow"),
    "night": ("at night", "under a night sky"),
    "tiles": ("on a tiled floor", "on tiles"),
    "snow": ("in the snow", "in a snowy landscape"),
    "desert": ("in the desert", "in a desert"),
    "plain": ("on plain white", "on a white background"),
}
BACKGROUNDS_TO = {
    "studio": ("into a studio",),
    "wood table": ("onto a wooden table",),
    "beach": ("to a beach", "to the beach"),
    "meadow": ("to a meadow", "onto a green meadow"),
    "night": ("into the night",),
    "tiles": ("onto a tiled floor", "onto tiles"),
    "snow": ("into the snow",),
    "desert": ("to the desert", "into the desert"),
}
LIGHTS = {
    "left": ("The light comes from the left.", "It is lit from the left."),
    "right": ("The light comes from the right.", "It is lit from the right."),
    "front": ("The light comes from the front.", "It is lit from the front."),
    "warm": ("The light is warm.", "A warm light shines on it."),
    "cool": ("The light is cool.", "A cool, bluish light shines on it."),
    "dim": ("The light is dim.", "There is little light."),
}
STYLES = {
    "photo": ("a photo", "a photograph"),
    "pencil sketch": ("a pencil sketch", "a pencil drawing"),
    "watercolour": ("a watercolour", "a watercolor painting"),
    "pixel art": ("a pixel art picture",),
    "black and white": ("a black and white photo", "a black-and-white photograph"),
    "cartoon": ("a cartoon", "a cartoon drawing"),
    "oil painting": ("an oil painting", "a painting in oil"),
}
STYLE_NAMES = {
    "photo": ("photo", "photographic"),
    "pencil sketch": ("pencil sketch", "pencil drawing"),
    "watercolour": ("watercolour", "watercolor"),
    "pixel art": ("pixel art",),
    "black and white": ("black and white",),
    "cartoon": ("cartoon",),
    "oil painting": ("oil painting",),
}

RELATIONS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
SIDES = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side"),
    "front": ("at the front", "in the foreground"),
    "back": ("at the back", "in the background"),
}
EXTREMES = {  # patterns around the noun
    "left": ("leftmost {}", "{} on the far left"),
    "right": ("rightmost {}", "{} on the far right"),
    "front": ("nearest {}", "{} closest to the viewer"),
    "back": ("farthest {}", "{} at the very back"),
}
POSES = {  # infinitives
    "standing": ("stand still with its arms down", "stand upright"),
    "arms out": ("stretch its arms out to the sides", "hold both arms out"),
    "arms up": ("raise both arms", "put its arms up", "hold both hands up"),
    "waving": ("wave", "wave with one hand"),
    "hands on hips": ("put its hands on its hips", "rest its hands on its hips"),
    "legs apart": ("stand with its legs apart", "spread its legs"),
    "kicking": ("kick", "lift one leg to kick"),
}
YES_NO = ("yes", "no")
