"""Chinese words for what is in a scene. Of several, the first is the canonical one, used in answers."""

SHAPES = {
    "ball": ("球", "圆球", "球体"),
    "cube": ("立方体", "方块", "正方体"),
    "cylinder": ("圆柱", "圆柱体"),
    "cone": ("圆锥", "圆锥体"),
    "torus": ("圆环", "甜甜圈"),
    "pyramid": ("金字塔", "棱锥"),
    "doll": ("人偶", "木偶"),
}
THING = ("物体", "东西")
COLOURS = {
    "red": ("红色",),
    "orange": ("橙色", "橘色"),
    "yellow": ("黄色",),
    "green": ("绿色",),
    "cyan": ("青色",),
    "blue": ("蓝色",),
    "purple": ("紫色",),
    "pink": ("粉色", "粉红色"),
    "white": ("白色",),
    "black": ("黑色",),
}
MATERIALS = {  # with 的: before a noun and after 是
    "matte": ("哑光的",),
    "glossy": ("光滑的", "有光泽的"),
    "metal": ("金属的", "金属质感的"),
    "striped": ("带条纹的", "条纹的"),
    "dotted": ("带圆点的", "波点的"),
}
FINISHES = MATERIALS
SIZES = {"small": ("小", "小小的"), "medium": ("中等大小的",), "large": ("大", "大大的")}
SIZES_SAID = {"small": ("小的", "小号的"), "medium": ("中等大小的",), "large": ("大的", "大号的")}
NUMBERS = ("零", "一", "两", "三", "四", "五")

BACKGROUNDS = {
    "studio": ("摄影棚",),
    "wood table": ("木桌", "木头桌子"),
    "beach": ("海滩", "沙滩"),
    "meadow": ("草地", "草坪"),
    "night": ("夜空", "夜晚的天空"),
    "tiles": ("瓷砖地面", "瓷砖地板"),
    "snow": ("雪地",),
    "desert": ("沙漠",),
    "plain": ("纯白背景", "白色背景"),
}
BACKGROUND_NAMES = BACKGROUNDS
BACKGROUNDS_AT = {
    "studio": ("在摄影棚里",),
    "wood table": ("在木桌上", "在木头桌子上"),
    "beach": ("在海滩上", "在沙滩上"),
    "meadow": ("在草地上", "在草坪上"),
    "night": ("在夜空下",),
    "tiles": ("在瓷砖地面上",),
    "snow": ("在雪地里", "在雪地上"),
    "desert": ("在沙漠里", "在沙漠中"),
    "plain": ("在纯白背景上", "在白色背景上"),
}
BACKGROUNDS_TO = {
    "studio": ("到摄影棚里",),
    "wood table": ("到木桌上",),
    "beach": ("到海滩上", "到沙滩上"),
    "meadow": ("到草地上",),
    "night": ("到夜空下",),
    "tiles": ("到瓷砖地面上",),
    "snow": ("到雪地里",),
    "desert": ("到沙漠里", "到沙漠中"),
}
LIGHTS = {
    "left": ("光从左边照过来。",),
    "right": ("光从右边照过来。",),
    "front": ("光从正面照过来。",),
    "warm": ("光线是暖色的。",),
    "cool": ("光线是冷色的。",),
    "dim": ("光线很暗。",),
}
STYLES = {
    "photo": ("一张照片",),
    "pencil sketch": ("一幅铅笔素描", "一幅铅笔画"),
    "watercolour": ("一幅水彩画",),
    "pixel art": ("一幅像素画",),
    "black and white": ("一张黑白照片",),
    "cartoon": ("一幅卡通画", "一幅漫画"),
    "oil painting": ("一幅油画",),
}
STYLE_NAMES = {
    "photo": ("照片",),
    "pencil sketch": ("铅笔素描", "铅笔画"),
    "watercolour": ("水彩画",),
    "pixel art": ("像素画",),
    "black and white": ("黑白照片",),
    "cartoon": ("卡通画", "漫画"),
    "oil painting": ("油画",),
}

RELATIONS = {
    "left of": ("左边", "左侧"),
    "right of": ("右边", "右侧"),
    "in front of": ("前面", "前方"),
    "behind": ("后面", "后方"),
}
SIDES = {
    "left": ("左边", "左侧"),
    "middle": ("中间",),
    "right": ("右边", "右侧"),
    "front": ("近处", "前景处"),
    "back": ("远处", "后方"),
}
EXTREMES = {
    "left": ("最左边的{}",),
    "right": ("最右边的{}",),
    "front": ("最前面的{}", "离得最近的{}"),
    "back": ("最后面的{}", "离得最远的{}"),
}
POSES = {
    "standing": ("双臂放下站好", "垂下双手站直"),
    "arms out": ("向两边张开双臂", "平举双臂"),
    "arms up": ("举起双手", "高举双臂"),
    "waving": ("挥手", "举起一只手挥手"),
    "hands on hips": ("双手叉腰",),
    "legs apart": ("双腿分开站立", "张开双腿"),
    "kicking": ("踢腿", "抬起一条腿踢出去"),
}
YES_NO = ("是", "否")
