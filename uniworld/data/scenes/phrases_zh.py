"""Chinese templates of captions, prompts, questions and perception tasks; sections and slots as in `phrases_en.py`."""

from uniworld.data.scenes.phrases import parse_phrases

PHRASES = parse_phrases("""
# prompt single object
{style}，上面有{a}
{a}
画{a}
生成一张有{a}的图片
# prompt two objects
{style}，上面有{a_1}和{a_2}
{a_1}和{a_2}
画{a_1}和{a_2}
一张有{a_1}和{a_2}的图片
# prompt counting
{style}，上面有{n_things}
{n_things}
画{n_things}
一张图片，里面正好有{n_things}
# prompt colors
{style}，上面有{a}
{a}
画{a}
生成{a}的图片
# prompt position
{style}，{a_1}在{a_2}的{relation}
{a_1}在{a_2}的{relation}
画{a_1}，它在{a_2}的{relation}
# prompt attribute binding
{style}，上面有{a_1}和{a_2}
{a_1}和{a_2}
画{a_1}，还有{a_2}
# prompt caption
{caption}
画出这个场景：{caption}
生成图片：{caption}
# prompt_background
{prompt}，{background_at}
{prompt}，背景是{background}

# caption short
{style}，上面有{parts}
{background_at}有{parts}
{style}，{background_at}有{parts}
{parts}
# caption long
{style}，{background_at}有{parts}。{places}{light}
{style}，画的是{parts}，背景是{background}。{places}{light}
这是{style}，{background_at}有{parts}。{places}{light}
# caption place
{the_1}在{the_2}的{relation}。
{the_1}位于{the_2}的{relation}。
# ask caption
描述这张图片
这张图里有什么？
你看到了什么？
给这张图写一个简短的说明
# ask caption long
详细描述这张图片
图里有什么，分别在哪里？
写一段详细的说明

# ask colour
{the}是什么颜色？
{the}的颜色是什么？
请说出{the}的颜色
# ask colour next
那{the}呢？
{the}呢？
# ask shape
{the}是什么形状？
{the}的形状是什么？
请说出{the}的形状
# ask count
图中有多少个{things}？
有几个{things}？
数一数有几个{things}
# ask exists
图中有{a}吗？
有没有{a}？
能看到{a}吗？
# ask relation
{the_1}在{the_2}的{relation}吗？
{the_1}是不是在{the_2}的{relation}？
# ask what_at
{the}的{relation}是什么？
什么东西在{the}的{relation}？
# ask where
{the}在哪里？
{the}在图中的什么位置？
# ask material
{the}的表面是什么样的？
{the}的表面有什么特点？
# ask background
背景是什么？
这张图是在哪里拍的？
这是什么地方？
# ask style
这张图是什么风格？
这是一张什么样的图？
# ask bigger
{the_1}和{the_2}哪个更大？
哪个更大，{the_1}还是{the_2}？
# ask smaller
{the_1}和{the_2}哪个更小？
哪个更小，{the_1}还是{the_2}？
# ask is_bigger
{the_1}比{the_2}大吗？
{the_2}比{the_1}小吗？
# ask same_colour
{the_1}和{the_2}颜色一样吗？
{the_1}和{the_2}是同一种颜色吗？
# ask more
{things_1}比{things_2}多吗？
图中的{things_1}是不是比{things_2}多？

# perceive canny
生成这张图片的Canny边缘图
用Canny检测边缘
# perceive depth
生成这张图片的深度图
估计这个场景的深度
# perceive hed
生成这张图片的HED边界图
用HED检测边界
# perceive mlsd
生成这张图片的MLSD直线图
用MLSD检测直线
# perceive normal
生成这张图片的法线图
估计这个场景的表面法线
# perceive pose
生成这张图片的OpenPose姿态图
检测人偶的骨架
# perceive sketch
把这张图变成手绘线稿
画出这张图的轮廓线稿
# perceive segment
把{the}从背景中分割出来
分割{the}
显示{the}的掩码
# perceive detect
检测{the}并画出边界框
用方框标出{the}
# perceive segment main
把主要物体从背景中分割出来
显示图中物体的掩码
# perceive segment all
把所有物体从背景中分割出来
显示前景的掩码
# perceive detect main
检测主要物体并画出边界框
用方框标出图中的物体
# perceive detect all
检测所有物体并画出边界框
用方框标出每个物体

# draw canny
根据这张Canny边缘图生成图片：{caption}
# draw depth
根据这张深度图生成图片：{caption}
# draw hed
根据这张HED边界图生成图片：{caption}
# draw mlsd
根据这张MLSD直线图生成图片：{caption}
# draw normal
根据这张法线图生成图片：{caption}
# draw pose
根据这张姿态图生成图片：{caption}
# draw sketch
根据这张线稿生成图片：{caption}
给这张线稿上色：{caption}
""")
