"""Chinese templates of edits and compositions; sections and slots as in `edit_phrases_en.py`."""

from uniworld.data.scenes.phrases import parse_phrases

EDIT_PHRASES = parse_phrases("""
# add
添加{a}
加上{a}
在图中加入{a}
在画面里放{a}
再画{a}
在空的地方放上{a}
# add_said
我还想看到{a}
能不能再加{a}？
# add_side
在画面{side}加{a}
在{side}放{a}
在图的{side}添加{a}
往{side}加上{a}
# add_side_said
{side}应该有{a}
# add_by
在{the}的{relation}加{a}
在{the}的{relation}放上{a}
把{a}放在{the}的{relation}
在{the}{relation}添加{a}
# add_by_said
{the}的{relation}应该有{a}
我想在{the}的{relation}看到{a}

# remove
去掉{the}
删除{the}
移除{the}
把{the}拿走
把{the}从图中去掉
让{the}消失
擦掉{the}
# remove_said
图里不应该有{the}
我不想看到{the}
能把{the}删掉吗？

# replace
把{the}换成{a}
用{a}代替{the}
将{the}替换为{a}
把{the}变成{a}
把{the}改成{a}
在{the}的位置放{a}
# replace_said
{the}应该换成{a}
能不能把{the}换成{a}？

# colour
把{the}变成{colour}
把{the}涂成{colour}
将{the}改为{colour}
把{the}的颜色改成{colour}
把{the}染成{colour}
让{the}变成{colour}
# colour_said
{the}应该是{colour}
我想让{the}变成{colour}

# material
把{the}变成{material}
让{the}的表面变成{material}
把{the}的表面改成{material}
将{the}改为{material}
# material_said
{the}的表面应该是{material}
能让{the}变成{material}吗？

# bigger
把{the}变大
放大{the}
让{the}大一些
把{the}的尺寸加大
# bigger_said
{the}应该更大
{the}太小了，变大一点
# smaller
把{the}变小
缩小{the}
让{the}小一些
把{the}的尺寸减小
# smaller_said
{the}应该更小
{the}太大了，变小一点
# size
把{the}变成{size}
将{the}的大小改为{size}
# size_said
{the}应该是{size}

# light left
让光从左边照过来
把光源移到左边
改成左侧光
# light right
让光从右边照过来
把光源移到右边
改成右侧光
# light front
让光从正面照过来
把光源移到前面
改成正面光
# light warm
让光线更暖
换成暖色的光
使用金黄色的暖光
# light cool
让光线更冷
换成冷色的光
使用偏蓝的冷光
# light dim
把光线调暗
让画面暗一些
降低灯光的亮度

# extract
提取{the}
把{the}抠出来
把{the}单独放在白色背景上
只保留{the}，其余变成白色
抠出{the}，背景用纯白
将{the}与背景分离
# extract_said
我只要{the}，背景是白色
能把{the}单独抠出来吗？

# background
把背景换成{background}
将背景改为{background}
把场景移{background_to}
用{background}作背景
把这些东西放{background_to}
# background_said
背景应该是{background}
我想看到它们{background_at}

# style
把这张图变成{style_name}
转换成{style_name}
把画面改成{style_name}风格
用{style_name}的风格重画
画成{style_name}
# style_said
我想要一张{style_name}
能变成{style_name}吗？

# move left
把{the}向左移
将{the}往左边移动
把{the}推到左边去
# move right
把{the}向右移
将{the}往右边移动
把{the}推到右边去
# move front
把{the}向前移
让{the}靠近一些
把{the}移近
# move back
把{the}向后移
让{the}远一些
把{the}移远
# move_by
把{the_1}移到{the_2}的{relation}
将{the_1}放到{the_2}的{relation}
让{the_1}移到{the_2}{relation}
# move_by_said
{the_1}应该在{the_2}的{relation}
# swap
交换{the_1}和{the_2}的位置
让{the_1}和{the_2}互换位置
把{the_1}和{the_2}对调
# pose
让{the}{pose}
改变{the}的姿势，让它{pose}
使{the}{pose}
# pose_said
{the}应该{pose}
我想让{the}{pose}

# hybrid
{first}，{second}
{first}，并且{second}
{first}，然后{second}
先{first}，再{second}
{first}，同时{second}

# keep
保持图片不变
不要改变任何东西
原样返回这张图
一切保持原样
再画一遍这张图
复制这张图片
重现这幅图
# keep_said
一切都应该保持原样
能不能把它再画一遍？

# compose put
把第二张图中的{the}放到第一张图里
将图二的{the}加入图一
把{the}从第二张图复制到第一张图
在第一张图里加上第二张图的{the}
# compose replace
把第一张图中的{the_1}换成第二张图中的{the_2}
用图二的{the_2}代替图一的{the_1}
将图一里的{the_1}替换为图二里的{the_2}
# compose background
把第一张图的背景换成第二张图的背景
给图一用上图二的背景
把图一里的东西放到图二的背景中
# compose colour
把第一张图中{the_1}的颜色改成第二张图中{the_2}的颜色
让图一的{the_1}和图二的{the_2}颜色一样
# compose style
用第二张图的风格重画第一张图
把图二的风格用到图一上
""")
