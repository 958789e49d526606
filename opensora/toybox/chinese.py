"""The toy world's language in Chinese: the grammar of `captions.py`, with Chinese wordings and Chinese word order.

Every character is a token of its own, so a model knows all that can be said with the characters of `CHARACTERS`.
"""

import random
import re
from collections.abc import Mapping, Sequence

from opensora.toybox.specs import ClipSpec, Thing, World

CHARACTER = "[\u3400-\u9fff]"
"""Regular expression of a Chinese character."""

ARTICLES = ("一个", "一个", "一个", "一个", "这个", "那个", "一只", "一颗", "")
SIZE_WORDS = {
    "small": ("小", "小", "小小的", "很小的", "小的", "小型"),
    "large": ("大", "大", "大大的", "很大的", "巨大的", "大型"),
}
COLOUR_WORDS = {
    "red": ("红", "红", "红色", "红色", "鲜红"),
    "green": ("绿", "绿", "绿色", "绿色", "翠绿"),
    "blue": ("蓝", "蓝", "蓝色", "蓝色", "天蓝"),
    "yellow": ("黄", "黄", "黄色", "黄色", "金色", "金黄"),
    "orange": ("橙", "橙", "橙色", "橙色", "橘色"),
    "purple": ("紫", "紫", "紫色", "紫色"),
    "white": ("白", "白", "白色", "白色", "雪白"),
    "pink": ("粉", "粉", "粉色", "粉红", "粉红色"),
}
SHAPE_WORDS = {
    "ball": ("球", "球", "圆球", "球体", "圆形"),
    "square": ("方块", "方块", "正方形", "方形", "正方体"),
    "triangle": ("三角形", "三角形", "三角"),
    "ring": ("圆环", "圆环", "环", "圆圈"),
    "cross": ("十字", "十字", "十字形", "加号"),
    "star": ("五角星", "星形", "星星"),
}
TOWARDS = ("向", "往", "朝")
SIDEWAYS = ("移动", "滚动", "滑动", "移", "滚", "滑", "走", "飘", "滑行", "运动")
ACROSS = ("滚过", "滑过", "飘过", "穿过", "走过", "经过", "移过")
SIDES = {"left": ("左", "左", "左边", "左侧"), "right": ("右", "右", "右边", "右侧")}
VERBS = {
    "still": ("静止不动", "不动", "静止", "保持不动", "一动不动", "停着", "停着不动", "静静地待着", "没有动"),
    "up": ("上升", "向上移动", "往上移动", "升起", "向上飘", "往上飘", "升高", "往上走", "升上去", "飞起来"),
    "down": ("下降", "向下移动", "往下移动", "落下", "往下掉", "掉下来", "下落", "下沉", "降落", "落下来"),
    "bounce": ("弹跳", "跳动", "上下弹跳", "蹦跳", "跳跃", "弹来弹去", "上下跳动", "跳来跳去"),
    "orbit": ("绕圈", "绕圈移动", "绕圈运动", "绕着圈走", "兜圈子", "画圈", "绕圈走", "做圆周运动"),
    "spin": ("旋转", "旋转", "转动", "自转", "原地旋转", "打转", "原地转圈", "转个不停"),
    "grow": ("变大", "变大", "越来越大", "长大", "增大", "膨胀", "变得更大", "放大"),
    "shrink": ("变小", "变小", "越来越小", "缩小", "收缩", "变得更小"),
}
SPEED_WORDS = {
    "slow": ("慢慢地", "慢慢", "缓缓地", "缓慢地", "轻轻地"),
    "fast": ("快速地", "快速", "飞快地", "迅速地", "很快地"),
}
PLACES = {
    "white": ("白色背景上", "白色背景前", "白墙前", "纯白背景上"),
    "grey": ("灰色背景上", "灰色背景前", "灰墙前", "纯灰背景上"),
    "wood": ("木地板上", "木板上", "木桌上", "木头地板上", "木桌子上"),
    "day": ("天空中", "蓝天上", "白天的天空中", "蓝天下", "白天", "晴空中", "云朵间", "天上"),
    "sunset": ("夕阳下", "日落时", "傍晚", "晚霞中", "黄昏", "傍晚的天空中"),
    "night": ("夜空中", "夜里", "星空下", "晚上", "黑夜里", "夜晚"),
    "grass": ("草地上", "草地上", "草坪上", "草原上", "田野上", "绿草地上"),
    "sand": ("沙滩上", "沙滩上", "沙地上", "沙漠里", "沙漠中", "沙丘上", "海滩上"),
    "water": ("水面上", "水上", "海上", "海面上", "湖面上", "湖上", "池塘上", "大海上"),
}
CROSSED = {
    "wood": ("木地板", "木板", "木桌"),
    "day": ("天空", "蓝天"),
    "sunset": ("傍晚的天空", "夕阳"),
    "night": ("夜空", "星空"),
    "grass": ("草地", "草地", "草坪", "草原", "田野"),
    "sand": ("沙滩", "沙地", "沙漠"),
    "water": ("水面", "海面", "湖面", "大海"),
}
"""What an object may be said to cross, 滚过草地; nothing crosses a wall."""
OPENINGS = ("", "", "", "", "视频里", "画面中", "一段视频")


def describe(thing: Thing, rng: random.Random, *, drop_size: bool = False, article: str | None = None) -> str:
    """ "一个小小的红色圆球", or 红色的小圆球: the colour may come first."""
    article = rng.choice(ARTICLES) if article is None else article
    size = "" if drop_size else rng.choice(SIZE_WORDS[thing.size])
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    if rng.random() < 0.4:
        return f"{article}{colour}{'的' if len(colour) > 1 or rng.random() < 0.3 else ''}{size}{shape}"
    return f"{article}{size}{colour}{'的' if len(colour) > 1 and rng.random() < 0.5 else ''}{shape}"


def _movement(spec: ClipSpec, rng: random.Random) -> tuple[str, bool]:
    """ "慢慢地向左滚动", or 向左滚过草地, and whether it says where."""
    adverb = rng.choice(SPEED_WORDS[spec.speed]) if spec.motion != "still" and rng.random() < 0.4 else ""
    if spec.motion not in SIDES:
        return adverb + rng.choice(VERBS[spec.motion]), False
    way = rng.choice(TOWARDS) + rng.choice(SIDES[spec.motion])
    if spec.background in CROSSED and rng.random() < 0.3:
        return f"{adverb}{way}{rng.choice(ACROSS)}{rng.choice(CROSSED[spec.background])}", True
    return f"{adverb}{way}{rng.choice(SIDEWAYS)}", False


def caption(spec: ClipSpec, rng: random.Random) -> str:
    """One of many wordings of a clip; says everything but, now and then, the size, the speed or the place."""
    movement, says_where = _movement(spec, rng)
    place = "" if says_where or rng.random() < 0.05 else rng.choice(PLACES[spec.background])
    drop_size, order = rng.random() < 0.05, rng.random()
    if order < 0.15:  # 在草地上向左滚动的小红球
        things = [f"{'在' if place else ''}{place}{movement}的{describe(spec, rng, drop_size=drop_size, article='')}"]
        if rng.random() < 0.5:
            things[0] = f"一个{things[0]}"
    elif place and order < 0.35:  # 草地上有一个小红球在向左滚动
        there_is = rng.choice(("有", "，", "在，"))
        front = f"在{place}，" if there_is == "在，" else place + there_is
        things = [f"{front}{describe(spec, rng, drop_size=drop_size)}{rng.choice(('', '在', '正在'))}{movement}"]
    else:  # 一个小红球在草地上向左滚动
        doing = f"在{place}" if place else rng.choice(("", "在", "正在"))
        things = [f"{describe(spec, rng, drop_size=drop_size)}{doing}{movement}"]
    if spec.second:
        things.append(f"和{describe(spec.second, rng, article='')}")
    opening = rng.choice(OPENINGS)
    if opening and not spec.second:
        things.insert(0, f"{opening}，")
    return "".join(things)


_PLAIN_VERBS = {"still": "静止不动", "left": "向左移动", "right": "向右移动", "up": "向上移动", "down": "向下移动"} | {
    "bounce": "弹跳",
    "orbit": "绕圈移动",
    "spin": "旋转",
    "grow": "变大",
    "shrink": "变小",
}


def plain_caption(spec: ClipSpec) -> str:
    """The one canonical wording, used to evaluate: "一个红色的小球在草地上向左移动"."""

    motion, place = _PLAIN_VERBS[spec.motion], PLACES[spec.background][0]
    size, shape = SIZE_WORDS[spec.size][0], SHAPE_WORDS[spec.shape][0]
    if spec.second is None:
        return f"一个{COLOUR_WORDS[spec.colour][2]}的{size}{shape}在{place}{motion}"
    second = spec.second
    other = f"{SIZE_WORDS[second.size][0]}{COLOUR_WORDS[second.colour][0]}{SHAPE_WORDS[second.shape][0]}"
    return f"一个{size}{COLOUR_WORDS[spec.colour][0]}{shape}在{place}{motion}和{other}"


def describe_vocabulary(world: World) -> str:
    """One line that tells a user what a model of this world can be asked for."""

    def listed(table: Mapping[str, tuple[str, ...]], names: Sequence[str]) -> str:
        return "、".join(table[name][0] for name in names)

    things = (
        f"{listed(SIZE_WORDS, world.sizes)}；{listed(COLOUR_WORDS, world.colours)}；{listed(SHAPE_WORDS, world.shapes)}"
    )
    motions = "、".join(_PLAIN_VERBS[motion] for motion in world.motions)
    return f"一个物体（{things}）{motions}，慢慢地或快速地，在一个地方（{listed(PLACES, world.backgrounds)}）"


def characters() -> frozenset[str]:
    """Every character of the language."""
    tables = (SIZE_WORDS, COLOUR_WORDS, SHAPE_WORDS, SIDES, VERBS, SPEED_WORDS, PLACES, CROSSED)
    phrases = [*ARTICLES, *OPENINGS, *TOWARDS, *SIDEWAYS, *ACROSS, *_PLAIN_VERBS.values(), "的有在正和"]
    phrases += [phrase for table in tables for options in table.values() for phrase in options]
    return frozenset(re.findall(CHARACTER, "".join(phrases)))


CHARACTERS = characters()
