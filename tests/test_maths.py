"""What counts as a correct mathematical answer, form by form, and what does not."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import accuracy_reward

from gxpo_trl.tasks.answers import Verdict, final_answer, verify_maths
from gxpo_trl.tasks.answers.normalize import normalize


def score(answer: str, gold: str) -> float | None:
    return verify_maths(rf"So the answer is $\boxed{{{answer}}}$.", gold).score


def vote(answer: str) -> str | None:
    return verify_maths(rf"\boxed{{{answer}}}", "1").answer


GOLDS = [
    *(
        "18",
        "-7",
        "36.0",
        "4.5e33",
        "1e-5",
        ".0000672",
        "+2",
        "-1./3",
        "2,125",
        r"10,\!080",
        r"11,\! 111,\! 111,\! 100",
    ),
    *(r"\frac43", r"\frac 59", r"\frac9{19}", r"\frac{270}7\text{ degrees}", r"11\sqrt2", r"1\frac{4}{5}"),
    *("p - q", r"$\frac{1}{2 n+2}$", r"\cot x", r"1 \pm \sqrt{19}", "6 - 5i", "2516_8", r"4210_{5}", r"\frac{\pi}{2}"),
    *(r"90^\circ", r"864 \mbox{ inches}^2", r"5.4 \text{ cents}", r"\$32,\!348", "62.5%", r"8 \%"),
    *(r"\left( 3, \frac{\pi}{2} \right)", "(6,31,-1)", "(3,4]", r"(-\infty, 2) \cup (3, \infty)", r"x \in [-2,7]"),
    *(r"\{1\pm\sqrt{5},-2\}", "1,-2", "$69$,$84$", "-2,-2", "$(1,8,19), (2,7,13)$", r"$(-\infty, 0) \cup\{1\}$."),
    *("x=5", "y = 2x + 3", "5x - 7y + 11z + 4 = 0", "$f(x)=2 x$", "MR=SRMC", r"$f(n)=n$, $g(n)=1$", r"k \geqslant 2"),
    *(r"\text{Evelyn}", r"\text{(C)}", "(A)", "np.arcsin(10/13)", r"m \frac{d v}{d t}+b v=f", r"E_{1},E_{2}"),
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_answer_is_right(gold):
    assert score(gold.replace("$", "") if r"\$" not in gold else gold, gold) == 1.0


SAME = [
    # A leading point, ratios of several, phrases, binomials, spaces of other names
    ("0.5", ".5"),
    (".5", "0.5"),
    (".5", r"\frac{1}{2}"),
    ("-0.5", "-.5"),
    ("5", ". 5"),
    ("5", "5."),
    ("0.35625", ".35625"),
    ("(0.5, 1)", "(.5,1)"),
    (r"\dbinom{8}{3}", "56"),
    ("56", r"\tbinom83"),
    (r"\dbinom{8}{3}", r"\binom{8}{3}"),
    (r"\triangle ABC\sim\triangle DEF", r"\triangle ABC \sim \triangle DEF"),
    (r"\sim 3.14", "3.14"),
    ("3", r"x\sim 3"),
    ("2:4:6", "1:2:3"),
    ("1:2:3", "1 : 2 : 3"),
    ("4:6", "2:3"),
    (r"1 : \sqrt 3 : 2", r"1:\sqrt{3}:2"),
    ("x>0", r"\{x : x>0\}"),
    ("1,2,1", "1,1,2"),
    ("1,2", "2,1"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("infinity", r"\infty"),
    ("three", "3"),
    ("3", "three"),
    ("negative infinity", r"-\infty"),
    (r"\text{no solution}", "No solution"),
    ("No solutions", "no solution"),
    ("no solution.", r"\text{no solution}"),
    (r"\sin x", "sin x"),
    ("5", "five meters"),
    (r"\text{evelyn}", "Evelyn"),
    ("no", "No"),
    (r"\text{yes}", "Yes"),
    ("⅛", r"\frac18"),
    ("3⅛", r"\frac{25}{8}"),
    ("⅜", r"\frac38"),
    (r"5\hspace{1cm}", "5"),
    (r"\thinspace 5\enspace", "5"),
    (r"5 \tag{1}", "5"),
    (r"{\huge 5}", "5"),
    (r"\vert x\vert", r"\lvert x\rvert"),
    (r"\vert x-1 \vert", "|x-1|"),
    (r"\$10", "ten dollars"),
    (r"\text{New York}", "New York"),
    ("4/3", r"\frac43"),
    (r"\dfrac{4}{3}", r"\frac43"),
    (r"1\frac13", r"\frac43"),
    ("1.333333", r"\frac43"),
    (r"\frac{\sqrt 2}{2}", r"\frac1{\sqrt2}"),
    (r"11\cdot\sqrt{2}", r"11\sqrt2"),
    (r"4.5 \times 10^{33}", "4.5e33"),
    (r"4.50\cdot 10^{33}", "4.5e33"),
    ("36", "36.0"),
    ("2125", "2,125"),
    (r"11{,}111{,}111{,}100", r"11,\! 111,\! 111,\! 100"),
    ("10 080", r"10,\!080"),
    (r"32348 \text{ dollars}", r"\$32,\!348"),
    (r"\$5.40", "5.4"),
    ("q(-1) + p", "p - q"),
    (r"\frac{1}{2(n+1)}", r"$\frac{1}{2 n+2}$"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\binom{5}{2}", "10"),
    (r"2^{10}", "1024"),
    ("1+\\sqrt{19}, 1-\\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"x = 1 \pm \sqrt{19}", r"1 - \sqrt{19}, 1 + \sqrt{19}"),
    (r"(1, \pm 2)", "(1,-2),(1,2)"),
    ("3", "x=3"),
    ("x = 3", "3"),
    ("x = 1 + 2 = 3", "3"),
    ("2x", "$f(x)=2 x$"),
    ("f(x) = x + x", "$f(x)=2 x$"),
    ("2x - y + 3 = 0", "y = 2x + 3"),
    ("10x - 14y + 22z + 8 = 0", "5x - 7y + 11z + 4 = 0"),
    ("2 \\leq k", r"k \geqslant 2"),
    ("[-2, 7]", r"x \in [-2,7]"),
    (r"-2 \leq x \leq 7", r"x \in [-2,7]"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\left(3, \tfrac12\pi\right)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(x, y) = (6, 31)", "(6,31)"),
    ("6, 31", "(6,31)"),
    (r"\{4, 3\}", r"\{3,4\}"),
    ("-2 \\text{ and } 1", "1,-2"),
    ("x = -2 or x = 1", "1,-2"),
    ("(2,7,13), (1,8,19)", "$(1,8,19), (2,7,13)$"),
    (r"\{5\}", "5"),
    ("[1, 2, 3]", "(1,2,3)"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\textbf{Evelyn}", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
    (r"\textbf{(C)}", "C"),
    ("15", r"15\mbox{ cm}^2"),
    ("15 cm^2", r"15\mbox{ cm}^2"),
    (r"15\text{ square centimeters}", r"15\mbox{ cm}^2"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"),
    ("90", r"90^{\circ}"),
    (r"\pi/2 \text{ m}", r"\frac{\pi}{2}"),
    ("18 apples", "18"),
    (r"62.5\%", "62.5%"),
    ("62.5", "62.5%"),
    ("0.625", "62.5%"),
    (r"\frac58", "62.5%"),
    (r"50\%", "50"),
    (r"50\%", r"\frac12"),
    (r"50\%", "0.5"),
    ("2516", "2516_8"),
    (r"E_1 + \frac13", r"\frac{1}{3}+E_{1}"),
    (r"(\gamma+1)(\gamma-1)", r"\gamma^{2}-1"),
    ("−3", "-3"),
    ("√2", r"\sqrt{2}"),
    ("1.75", "7/4"),
    (r"I(0)\exp(-t)", "I(0) e^{-t}"),
    (r"\dot x_0 + 1", r"1 + \dot{x}_{0}"),
    (r"1 - \mathrm{e}^{-1}", r"1-\frac{1}{\mathrm{e}}"),
    ("x<0 \\text{ or } x=1", r"(-\infty, 0) \cup\{1\}"),
    ("[0,2]", r"[0,1]\cup[1,2]"),
    ("[0,2]", r"[0,1)\cup[1,2]"),
    (r"(0,2)\cup(2,3)", r"(0,1]\cup(1,2)\cup(2,3)"),
    (r"(-\infty,0]", r"(-\infty,0)\cup\{0\}"),
    (
        r"[-1,\infty)\setminus\{-\frac12,0,1\}",
        r"[-1, -\frac{1}{2}) \cup (-\frac{1}{2}, 0) \cup (0, 1) \cup (1, \infty)",
    ),
    (r"(-\infty,\infty)\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
    ("-x>-1", "x<1"),
    ("1>x", "x<1"),
    ("y+x<=5", "x+y<=5"),
    ("c<a+b", "a+b>c"),
    ("y-2x>1", "y>2x+1"),
    ("y<x+2", "2y-2x<4"),
    ("[0,2]", r"x\in[0,1]\cup[1,2]"),
    (r"[0,1]\setminus\{0,1\}", "(0,1)"),
    (r"\{1,2,3\}\setminus\{2\}", r"\{1,3\}"),
    (r"(3,4)\cup(1,2)", r"(1,2)\cup(3,4)"),
    (r"(a,\infty)\cup(-\infty,-a)", r"(-\infty,-a)\cup(a,\infty)"),
    ("x>0", r"[0,\infty)\setminus\{0\}"),
    (r"(\{1,2\},3)", r"(\{1\}\cup\{2\}, 3)"),
    ("(0,5)", r"(0,5)\cup(2,3)"),
    (r"(-\infty,\frac12)\cup(\frac12,\infty)", r"x\ne\frac12"),
    (r"\mathbb{R}\setminus\{1,2\}", r"x\ne 1, x\ne 2"),
    (r"(-\infty,1)\cup(1,2)\cup(2,\infty)", r"x\ne 1, 2"),
    (r"\mathbb{R}\setminus\{1,2\}", r"x\ne 1 \text{ and } x\ne2"),
    (r"\mathbb{R}\setminus\{-1,1\}", r"x\ne\pm1"),
    (r"x\ne0,2,-2", r"\mathbb{R}\setminus\{0,\pm2\}"),
    (r"x\ne1", r"\{x\in\mathbb{R}:x\ne1\}"),
    (r"\mathbb{R}-\{1\}", r"\{x \mid x\ne1\}"),
    (r"x\ne3", r"x\in\mathbb{R}\setminus\{3\}"),
    (r"\{1,2,3\}", r"\{x\in\mathbb{Z}:1\le x\le3\}"),
    ("-1,0,1", r"\{n\in\mathbb{Z}\mid -2<n<2\}"),
    (r"\{1,2\}", r"\{n\in\mathbb{N}\mid 0<n<3\}"),
    (r"x\neq0", r"\mathbb{R}\backslash\{0\}"),
    ("x != 2", "x≠2"),
    (r"\emptyset", r"\{x\in\mathbb{Z}:2<x<3\}"),
    (r"x\ne1", r"\mathbb R\setminus\{1\}"),
    ("1a_{16}", "1A_{16}"),
    (r"\lfloor\frac{m+5}{6}\rfloor", r"\lceil\frac{m}{6}\rceil"),
    (r"\{(2,3)\}\cup\{(1,5)\}", r"\{(1,5),(2,3)\}"),
    (r"([0,1]\cup[1,2], 3)", "([0,2],3)"),
    (r"x \in [0,1) \cup \{1\}", r"0 \le x \le 1"),
    ("ff_{16}", "FF_{16}"),
    ("2B3_{12}", "2b3_{12}"),
    ("x^2+c", "x^2+C"),
    (r"\cos x + c", r"\cos x+C"),
    (r"\ln|x|+c", r"\ln|x|+C"),
    (r"8:34\text{ p.m.}", "20:34"),
    ("8:34 PM", "20:34"),
    (r"9:05\text{ a.m.}", "9:05"),
    ("12:10 a.m.", "0:10"),
    (r"x\ne1", r"\mathbb R\setminus\{1\}"),
    (r"x \ne 0", r"(-\infty,0)\cup(0,\infty)"),
    (r"\{x : x > 2\}", r"(2,\infty)"),
    ("|x| < 3", "(-3,3)"),
    ("]0, 12.5[", "(0,12.5)"),
    (r"\mathbb{R} \setminus \{3\}", r"x \neq 3"),
    (r"\{1,3\} \cup \{2\}", r"\{1,2,3\}"),
    (r"(\{2,1\}, 3)", r"(\{1,2\}, 3)"),
    ("4:6", "2:3"),
    (r"{10 \choose 3}", "120"),
    (r"3\ \Omega", "3"),
    (r"5\ \mu\text{m}", r"5\text{ micrometers}"),
    (r"7\text{ megahertz}", r"7\text{ MHz}"),
    (r"5\,\frac{\mathrm{m}}{\mathrm{s}}", r"5\text{ meters per second}"),
    (r"5\text{ m}\,\text{s}^{-1}", r"5\text{ m/s}"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"1101_{\text{two}}", "1101_2"),
    (r"\text{an Ellipse}", r"\text{ellipse}"),
    (r"n(n-1)!", "n!"),
    (r"\frac{n(n-1)}{2}", r"\binom{n}{2}"),
    (r"F_n = \sum_{k=0}^{n-1} F_{n-k-1} F_k", r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}"),
    # Words: case, articles, plurals of phrases, hyphens and punctuation between them don't count
    (r"\text{a circle of radius 3.}", r"\text{Circle of radius 3}"),
    (r"\text{no real solutions}", r"\text{no real solution}"),
    (r"\text{non-negative}", r"\text{Nonnegative}"),
    (r"\text{increasing, then decreasing}", r"\text{increasing then decreasing}"),
    (r"\text{it's true}", r"\text{its true}"),
    (r"\text{x>3}", r"\text{x > 3}"),
    (r"(-1, \text{The Point})", r"(-1, \text{point})"),
    # Magnitudes before units
    (r"3\text{ million dollars}", "3000000"),
    ("3 million dollars", "3000000"),
    (r"\$3\text{ million}", r"3\text{ million dollars}"),
    (r"3{,}000\text{ miles}", r"3\text{ thousand miles}"),
    (r"2\text{ hundred thousand people}", "200000"),
    ("three million", "3{,}000{,}000"),
    (r"3\text{ million US dollars}", r"\$3{,}000{,}000"),
    (r"3\text{ dozen eggs}", "36"),
    (r"3\text{ dozens}", "36"),
    (r"5\text{ fourth graders}", "5"),
    # Two asterisks: a power, and bold type
    ("x^2", "x**2"),
    ("x**2", "x^2"),
    ("2**10", "1024"),
    ("2 ** 10", "1024"),
    ("x**(-1) + y**-2", r"\frac{1}{x} + y^{-2}"),
    ("(x+1)**2", "x^2 + 2x + 1"),
    (r"\sqrt{x}**3", "x^{3/2}"),
    ("2**3**2", "512"),
    ("n!**2", "(n!)^2"),
    ("**2**", "2"),
    ("**x**2**", "x^2"),
    ("**$x^2$**", "x^2"),
    ("x = **5**", "5"),
    ("**3**, **4**", "3, 4"),
    (r"\text{**yes**}", "yes"),
    # Times of day
    (r"3:00\text{ p.m.}", r"3:00\text{ PM}"),
    ("10:30 a.m.", r"10:30\text{ AM}"),
    ("10:30am", r"10:30\text{ a.m.}"),
    (r"3\text{ P.M.}", "3 p.m."),
    ("10:30", r"10:30\text{ AM}"),
    # A subscript or exponent is no part of a number's thousands
    (r"\log_2(100)", r"\log_2 100"),
    (r"\log_2 128 = 7", "7"),
    (r"\log_5 625", "4"),
    (r"\log_{12} 144", "2"),
    (r"\log_10 100", "2"),
    ("1000", "2^3 125"),
    ("1 234 567", "1234567"),
    # A number in the text with its units
    (r"\text{5 cm}", "5"),
    (r"5\text{ cm}", r"\text{5 cm}"),
    (r"\text{18 dollars}", "18"),
    (r"\text{\$18}", "18"),
    (r"\text{18 €}", "18"),
    (r"\text{1,800 dollars}", "1800"),
    (r"\text{5 apples}", "5"),
    (r"\text{-5 degrees}", "-5"),
    (r"\text{90°}", r"90^\circ"),
    (r"\text{1 1/2 cups}", "1.5"),
    (r"\text{1/2 cup}", "0.5"),
    (r"\text{3 million dollars}", "3000000"),
    (r"x = \text{1.5 hours}", r"1.5\text{ h}"),
    # Percents of decimals and mixed numbers; units that stand in the singular after fractions
    (r"12.5\%", "12.5"),
    (r"37\frac12\%", "37.5"),
    (r"-12.5\%", "-12.5"),
    (r"33\frac13\%", r"\frac{100}{3}"),
    (r"\frac34\text{ cup}", "0.75"),
    (r"\frac12\text{ gallon}", "0.5"),
    ("3/4 cup", "0.75"),
    # Lines that are aligned: a system, or a chain of equations
    (r"\begin{aligned}x&=1\\y&=2\end{aligned}", "x=1, y=2"),
    (r"\begin{align*}y&=2\\x&=1\end{align*}", "x=1, y=2"),
    (r"\begin{gathered}x=1\\y=2\end{gathered}", "1, 2"),
    (r"\begin{aligned}x&=3+4\\&=7\end{aligned}", "7"),
    # Operators whose sides can't be exchanged
    (r"A \setminus B", r"A\smallsetminus B"),
    (r"p \Rightarrow q+1", r"p\implies 1+q"),
    (r"h + f\circ g", r"f\circ g + h"),
    (r"p \rightarrow 2q", r"p\to q\cdot 2"),
    (r"B\cap A", r"A\cap B"),
    ("2024-01-05", "2024-01-05"),
    (r"\text{2024-01-05}", "2024-01-05"),
    ("123456789012345678901234567890", "1.2345678901234568e+29"),
    (r"\text{7:30 p.m.}", r"7:30\text{ PM}"),
    (r"\text{7:30 PM}", "7:30 PM"),
    (r"\text{8 AM}", r"8\text{ a.m.}"),
    (r"\text{2 hours 30 minutes}", r"\text{2 hours, and 30 minutes}"),
    # A root
    ("-2", r"\sqrt[3]{-8}"),
    # A decimal comma, a unit of one letter
    ("0,5", "0.5"),
    ("25 s", r"25\text{ seconds}"),
    (r"25\text{ s}", "25 s"),
    # Numbers in words
    ("twenty-one", "21"),
    (r"\text{forty two}", "42"),
    ("one hundred and five", "105"),
    ("two thousand, five hundred", "2500"),
    (r"\text{negative five}", "-5"),
    ("minus 5", "-5"),
    ("twelve apples", "12"),
    ("3/2", "three halves"),
    (r"\text{three-quarters}", "3/4"),
    ("half", "0.5"),
    ("3rd", "3"),
    # Separators of other languages and of Python, other notations of numbers
    ("1.000.000", "10^6"),
    ("1.234,5", "1234.5"),
    ("1_000_000", "10^6"),
    (r"1{,}5", "1.5"),
    ("3 x 10^8", r"3\times 10^8"),
    (r"\nicefrac{3}{4}", r"\frac34"),
    ("+/- 2", "2, -2"),
    ("(-inf, 2)", r"(-\infty, 2)"),
    ("(101)_2", "101_2"),
    # Units in plain text, of siunitx, of other currencies
    ("60 km/h", "60"),
    ("9.8 m/s^2", r"9.8\text{ m/s}^2"),
    ("5 lbs", "5 pounds"),
    ("50 Hz", "50"),
    ("5 USD", "5"),
    ("₹5", "5"),
    ("25¢", "25 cents"),
    (r"\SI{5}{m}", r"5\text{ m}"),
    (r"\num{1000}", "1000"),
    # What surrounds an answer
    (r"\text{The answer is 5}", "5"),
    (r"5\text{ is the answer}", "5"),
    (r"\therefore x = 5", "5"),
    (r"\Rightarrow 5", "5"),
    (r"5 \checkmark", "5"),
    (r"5\text{ (approx.)}", "5"),
    ('"5"', "5"),
    ("`5`", "5"),
    ("\u200b5\ufeff", "5"),
    ("5\\ ", "5"),
    (r"\mathbf{x = 5}", "5"),
    (r"\boldsymbol{\frac{1}{2}}", "0.5"),
    # Rows of matrices, open ends
    (r"\begin{bmatrix}1&2\cr3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1/2\\[4pt]3\end{pmatrix}", r"\begin{pmatrix}\frac{1}{2}\\3\end{pmatrix}"),
    (r"\begin{pmatrix}0.5&2\end{pmatrix}", r"\begin{pmatrix}1/2&2\end{pmatrix}"),
    (r"\begin{array}{c}5\end{array}", "5"),
    ("[0,5)", "[0,5["),
    (r"]0,1] \cup [2,3[", r"(0,1]\cup[2,3)"),
    (r"\{\varnothing\}", r"\{\{\}\}"),
]


@pytest.mark.parametrize("answer, gold", SAME)
def test_another_way_of_writing_it_is_right(answer, gold):
    assert score(answer, gold) == 1.0


DIFFERENT = [
    ("5", ".5"),
    (".5", "5"),
    (r"\triangle ABC \sim \triangle XYZ", r"\triangle ABC \sim \triangle DEF"),
    ("1:6", "1:2:3"),
    ("1:2:4", "1:2:3"),
    ("5:4:3", "3:4:5"),
    ("1,2,2", "1,1,2"),
    ("one solution", "No solution"),
    ("x plus y", "x+y"),
    ("decreasing", "monotonically increasing"),
    ("17", "18"),
    (r"\frac34", r"\frac43"),
    (r"11\sqrt3", r"11\sqrt2"),
    ("1.33", r"\frac43"),
    (r"\frac13", "0.33"),
    ("4.5", "4.5e33"),
    ("4.5e34", "4.5e33"),
    ("1e-8", "1e-5"),
    (".0000673", ".0000672"),
    ("0", "1e-8"),
    ("2.7779e-6", "2.7778e-6"),
    ("125, 2", "2,125"),
    ("q - p", "p - q"),
    (r"\frac{R}{r}", "1"),
    ("1 + \\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("y = 5", "x=5"),
    ("f(x) = 3x", "$f(x)=2 x$"),
    ("2x + 4 = y", "y = 2x + 3"),
    (r"\frac{1}{x}", "x"),
    (r"2^{1009}+1", "2^{1009}"),
    ("(4,3)", "(3,4)"),
    (r"\{3,4\}", "(3,4)"),
    ("(3,4)", r"\{3,4\}"),
    ("4,3", "(3,4)"),
    ("[3,4]", "(3,4)"),
    ("(3,4)", "(3,4]"),
    ("[3,4)", "(3,4]"),
    ("(3,4,5)", "(3,4)"),
    ("(3)", "(3,4)"),
    ("1", "1,-2"),
    ("1,-2,3", "1,-2"),
    ("-2", "-2,-2"),
    ("3, 3", "3"),
    (r"\{1\pm\sqrt{5}\}", r"\{1\pm\sqrt{5},-2\}"),
    ("(1,8,19)", "$(1,8,19), (2,7,13)$"),
    ("(1,8,19), (7,2,13)", "$(1,8,19), (2,7,13)$"),
    ("[0,2]", r"[0,1)\cup(1,2]"),
    ("(1,5)", "(1,5),(2,3)"),
    (r"(1,5)\text{ or }(2,3)", "(1,5)"),
    ("x>-1", "x<1"),
    ("-x<-1", "x<1"),
    (r"-x\ge-1", "x<1"),
    (r"x+y\le5", "x+y<5"),
    ("x+y>5", "x+y<5"),
    ("x+y=5", "x+y<5"),
    ("y<2x+1", "y>2x+1"),
    ("x+y<6", "x+y<5"),
    (r"[0,\infty)", r"[0,\infty)\setminus\{0\}"),
    (r"[0,\infty)\setminus\{2\}", r"[0,\infty)\setminus\{1\}"),
    (r"B\setminus A", r"A\setminus B"),
    (r"\{1,2,3\}\setminus\{3\}", r"\{1,3\}"),
    (r"(0,1)\cup(1,2)", "(0,2)"),
    ("x=1", "x<1"),
    ("5", "x+y<5"),
    (r"x\ne2", r"x\ne1"),
    (r"x\ne1", r"x\ne\pm1"),
    (r"x\ne1,2", r"x\ne1,y\ne2"),
    (r"\mathbb{R}", r"x\ne\pm1"),
    ("1", r"x\ne 1"),
    (r"\{1,2,3\}", r"\{x\in\mathbb{Z}:1\le x<3\}"),
    (r"\{0,1,2\}", r"\{x\in\mathbb{N}:0\le x<3\}"),
    ("x=1", r"x\ne1"),
    ("[1,3]", r"\{x\in\mathbb{Z}:1\le x\le3\}"),
    ("1B_{16}", "1A_{16}"),
    (r"\lfloor\frac{2 n}{5}\rfloor", r"\lfloor\frac{2 n-1}{5}\rfloor"),
    (r"\lceil\frac{m}{6}\rceil", r"\lfloor\frac{m+4}{6}\rfloor"),
    (r"\lceil\frac{k}{3}\rceil", r"\lfloor\frac{k}{3}\rfloor+1"),
    ("n-m", "m-n"),
    (r"\{(1,5)\}\cup\{(2,3)\}", r"\{(1,5)\}"),
    (r"([0,1]\cup[1,3], 3)", "([0,2],3)"),
    (r"(-\infty,\infty)\setminus[1,2]", r"(-\infty,1)\cup(1,\infty)"),
    ("1a_{15}", "1A_{16}"),
    ("x^2+D", "x^2+C"),
    ("a+b+C+C", "a+b+C+c"),
    ("cx+c", "cx+C"),
    (r"8:34\text{ a.m.}", "20:34"),
    (r"8:35\text{ p.m.}", "20:34"),
    (r"8:34\text{ p.m.}", r"8:34\text{ a.m.}"),
    ("x^2", "x^2+C"),
    (r"(-\infty, 2)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"(-\infty, 2] \cup (3, \infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"-2 < x \leq 7", r"x \in [-2,7]"),
    ("k > 2", r"k \geqslant 2"),
    (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Navin}", r"\text{Evelyn}"),
    (r"\text{seat}", r"\text{east}"),
    ("D", r"\text{(C)}"),
    (r"15\text{ m}^2", r"15\mbox{ cm}^2"),
    (r"15\text{ cm}^3", r"15\mbox{ cm}^2"),
    (r"16\text{ cm}^2", r"15\mbox{ cm}^2"),
    ("5.4 dollars", r"5.4 \text{ cents}"),
    ("6", "$6m$"),
    ("2", "$2RC$"),
    (r"\frac{1}{m}", r"\frac{1}{m} t"),
    ("0.5", "50"),
    (r"0.5\%", "0.5"),
    (r"5000\%", r"50\%"),
    ("0.08", "8"),
    ("2516_9", "2516_8"),
    ("2517", "2516_8"),
    (r"-m \frac{d v}{d t}+b v=f", r"m \frac{d v}{d t}+b v=f"),
    (r"\gamma^{2}-2", r"\gamma^{2}-1"),
    (r"\frac{1}{0}", "1"),
    ("words without number", "7"),
    ("1 2", "12"),
    ("0", "$10^{-20}$"),
    (r"\angle A E B_{2}=90", r"\angle A E B_{1}=90"),
    ("E_2 = 5", "E_1 = 5"),
    ("x_{2}", "x_{1}"),
    (r"\theta_{v} + 1", r"\theta_{w} + 1"),
    ("-f(x)=2x", "$f(x)=2 x$"),
    ("-x = 5", "5"),
    ("0", "I(0)"),
    ("y' + 2y = 0", "I(0)"),
    (r"I(1) e^{-t}", r"I(0) e^{-t}"),
    (r"\lfloor\sqrt{n-3}\rfloor", r"\lfloor\sqrt{n-1}\rfloor"),
    ("5 perhaps seven", "5"),
    (r"\int_0^1 x dx", "7"),
    ("9" * 5000, "9"),
    (r"7\text{ mHz}", r"7\text{ MHz}"),
    (r"5\text{ s}", r"5\text{ m}"),
    (r"5\text{ rad}", r"5^\circ"),
    ("2517_8", "2516_8"),
    ("2516_7", "2516_8"),
    (r"8\text{ plus nine}", "8"),
    (r"8\text{ hundreds}", "8"),
    ("-(1,2)", "(-1,-2)"),
    ("(1,2) + (3,4)", "(1,2,3,4)"),
    (r"\exp^{-1}(1)", "1"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac16"),
    ("y = 3x + 1", "y = 3x"),
    ("(2, 1), 3", "(1, 2), 3"),
    # Signs, relations and decimal points in a text, and a name's last letter
    (r"\text{x < 3}", r"\text{x > 3}"),
    (r"\text{y = x - 1}", r"\text{y = x + 1}"),
    (r"\text{15 hours or so}", r"\text{1.5 hours or so}"),
    (r"\text{5 below}", r"\text{-5 below}"),
    (r"\text{A-}", r"\text{A+}"),
    (r"\text{A}", r"\text{A+}"),
    (r"\text{12 of it}", r"\text{1/2 of it}"),
    (r"\text{June 15}", r"\text{June 1-5}"),
    (r"\text{rooms 12}", r"\text{rooms 1, 2}"),
    (r"\text{xy}", r"\text{x-y}"),
    (r"\text{f}", r"\text{f'}"),
    (r"\text{Jame}", r"\text{James}"),
    (r"\mathrm{2x-1}", r"\mathrm{2x+1}"),
    (r"\operatorname{2x-1}", r"\operatorname{2x+1}"),
    (r"(-1, \text{x < 3})", r"(-1, \text{x > 3})"),
    # A magnitude or a part that is left out
    (r"3\text{ million dollars}", "3"),
    ("3 million dollars", "3"),
    (r"3\text{ thousand miles}", "3"),
    (r"3\text{ billion people}", "3"),
    (r"3\text{ dollars}", r"3\text{ million dollars}"),
    (r"3\text{ dozen eggs}", "3"),
    (r"3\text{ brand new dozens}", "3"),
    (r"18\text{ dozens}", "18"),
    (r"18\text{ tenths}", "18"),
    (r"18\text{ hundredths}", "18"),
    (r"18\text{ half miles}", "18"),
    (r"18\text{ hundredths of seconds}", "18"),
    ("2x", "x**2"),
    ("2**10", "210"),
    ("x2", "x**2"),
    ("2**3**2", "64"),
    ("2**2", "2"),
    # Times of day
    (r"10:30\text{ a.m.}", r"10:30\text{ p.m.}"),
    ("10:30 AM", r"10:30\text{ PM}"),
    (r"10:00\text{ a.m.}", r"10:00\text{ p.m.}"),
    (r"3\text{ a.m.}", r"3\text{ p.m.}"),
    (r"3\text{ a.m.}", r"3\text{ m}"),
    ("3am", "3"),
    (r"\log_2 127 = 7", "7"),
    (r"\log_5 125", "4"),
    (r"\log_2128", "7"),
    # A number in the text with its units
    (r"\text{6 cm}", "5"),
    (r"\text{5 m}", r"\text{5 cm}"),
    (r"\text{12 cups}", r"\text{1/2 cup}"),
    (r"\text{15 hours}", r"\text{1.5 hours}"),
    (r"\text{5 degrees}", r"\text{-5 degrees}"),
    (r"\text{June 5}", "5"),
    (r"\text{5 perhaps seven}", "5"),
    (r"\text{5 or 6 apples}", "5"),
    (r"\text{3D}", "3"),
    (r"\text{1 2}", "12"),
    (r"12.6\%", "12.5"),
    ("0.125", "12.5"),
    (r"0.5\%", r"\frac12"),
    (r"4\text{ cups}", r"\frac34\text{ cup}"),
    (r"\begin{aligned}x&=1\\y&=3\end{aligned}", "x=1, y=2"),
    (r"\begin{aligned}x&=1\\y&=2\end{aligned}", "x=2, y=1"),
    (r"\begin{aligned}x&=3+4\\&=8\end{aligned}", "7"),
    (r"B\setminus A", r"A\setminus B"),
    (r"q\to p", r"p\to q"),
    (r"q\Rightarrow p", r"p\implies q"),
    (r"g\circ f", r"f\circ g"),
    (r"B\subset A", r"A\subset B"),
    (r"(p\to q)\to r", r"p\to (q\to r)"),
    (r"2q\to p", r"p\to 2q"),
    # A date is no difference
    ("2024-05-01", "2024-01-05"),
    ("2018", "2024-01-05"),
    ("123456789012345688901234567890", "1.2345678901234568e+29"),
    (r"\text{7:30 a.m.}", r"\text{7:30 p.m.}"),
    (r"\text{8 AM}", r"8\text{ PM}"),
    # A root
    ("2", r"\sqrt[3]{-8}"),
    ("2", r"\sqrt[4]{-16}"),
    # A decimal comma, a unit of one letter
    ("0,6", "0.5"),
    ("3.5", "3, 5"),
    ("25 m", r"25\text{ s}"),
    # Words and notations that are another number, or none
    ("two three", "23"),
    ("five six", "11"),
    ("two or three", "2"),
    ("third", "1/3"),
    ("a", "1"),
    ("three solutions", "two solutions"),
    (r"\text{The answer is not }5", "5"),
    ("5 + -2", r"5\pm 2"),
    ("60 km/h", "60 m/s"),
    ("5 kHz", "5 Hz"),
    ("₹5", r"\$5"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}2&1\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("[0,5]", "[0,5["),
    (r"\emptyset", r"\{\emptyset\}"),
    (r"\{∅\}", r"\emptyset"),
]


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_a_neighbour_is_wrong(answer, gold):
    assert score(answer, gold) == 0.0


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"First \boxed{3}, so in the end we have $\boxed{4}$. Done.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1,2"),
        (r"$x=\boxed{1}$, $y=\boxed{2}$", "1,2"),
        (r"\boxed{7} \boxed{7}", "7"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        (r"\boxed {\{1,2\}}", r"\{1,2\}"),
        ("The final answer is $7$. I hope it is correct.", "7"),
        (r"**Answer:** \(x^2\)", "x^2"),
        ("The answer is 7.", None),
        (r"\boxed{}", None),
        (r"\boxed{5} and then \boxed{\frac{1}{", None),
        ("Seven.", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_text(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize("completion", ["", "I give up.", "The answer is 7.", r"\boxed{}", r"\boxed{7"])
def test_no_final_answer_is_wrong_not_undecided(completion):
    assert verify_maths(completion, "7") == Verdict(0.0, None)


@pytest.mark.parametrize(
    "gold", [r"Adding gives $3+4$, \boxed{7}.", "3 + 4 = <<3+4=7>>7\n#### 7", "$7$", r"\boxed{7}", " 7.0 "]
)
def test_a_gold_may_be_a_whole_solution(gold):
    assert score("7", gold) == 1.0
    assert score("4", gold) == 0.0


@pytest.mark.parametrize("gold", ["", "$$", r"\boxed{}", "(0,4", r"\frac{1}{2"])
def test_a_gold_that_cannot_be_read_decides_nothing(gold):
    assert score("7", gold) is None


def test_an_unreadable_gold_still_accepts_itself():
    assert verify_maths(r"The answer is $\{0, 4$.", r"\{0,4").score == 1.0


@pytest.mark.parametrize(
    "one, other",
    [
        (r"\dfrac12", "1/2"),
        ("0.50", r"\frac{1}{2}"),
        ("1,000", "1000"),
        ("x = 5", "5.0"),
        (r"5 \text{ cm}", "5"),
        (r"\{2, 1\}", "1, 2"),
        (r"\text{East}", "east"),
        ("(C)", r"\text{C}"),
        ("2x", "2 \\cdot x"),
        (r"\left(1,\tfrac{1}{2}\right)", "(1, 0.5)"),
    ],
)
def test_answers_that_are_alike_get_one_vote(one, other):
    assert vote(one) == vote(other) is not None


@pytest.mark.parametrize(
    "one, other", [("1", "2"), ("(1,2)", "(2,1)"), ("(1,2)", r"\{1,2\}"), ("[1,2)", "[1,2]"), ("50", "50%")]
)
def test_other_answers_get_their_own(one, other):
    assert vote(one) != vote(other)


@pytest.mark.parametrize(
    "text, normal",
    [
        (r"$\dfrac 59$", r"\frac{5}{9}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        ("½", r"1/2"),
        (r"\textcolor{blue}{\mathbf{73}}", "{ 73 }"),
        (r"\sqrt[3]2 + \sqrt2", r"\sqrt[3]2 + \sqrt{2}"),
        (r"\left( 1,\ 2 \right]", "( 1, 2 ]"),
        (r"90^{\circ}", r"90\degree"),
        ("x₁²", "x_{1}^{2}"),
        (r"e^{-2t}", "e^{-2t}"),
        (r"1\,234\,567.", "1234567"),
        ("5 miles per hour", r"5 \unit{mi} / \unit{h}"),
        (r"5\text{ sq. kilometers}", r"5\unit{km}^2"),
        ("(1,234)", "(1,234)"),
    ],
)
def test_normalized_latex(text, normal):
    assert normalize(text) == normal
    assert normalize(normal) == normal


@settings(max_examples=40, deadline=None)
@given(st.fractions(-1000, 1000, max_denominator=99), st.fractions(-1000, 1000, max_denominator=99))
def test_fractions_are_equal_exactly_when_their_values_are(one, other):
    latex = rf"\frac{{{one.numerator * 3}}}{{{one.denominator * 3}}}"
    assert score(latex, str(one)) == 1.0
    assert score(latex, str(other)) == float(one == other)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=5), st.randoms())
def test_order_matters_in_round_brackets_only(elements, random):
    shuffled = random.sample(elements, len(elements))
    gold, answer = (", ".join(map(str, values)) for values in (elements, shuffled))
    assert score(answer, gold) == 1.0
    assert score(rf"\{{{answer}\}}", rf"\{{{gold}\}}") == 1.0
    assert score(f"({answer})", f"({gold})") == float(shuffled == elements)


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet=r"\{}[]()$,;=^_%0123xpi \frac\boxed\text", max_size=40),
    st.sampled_from(["7", "(1,2)", r"\frac12"]),
)
def test_no_text_makes_it_raise(text, gold):
    assert verify_maths(text, gold).score in (0.0, 1.0)
    assert verify_maths(rf"\boxed{{{text}}}", gold).score in (0.0, 1.0)


def test_what_accuracy_reward_accepts_of_these_stays_accepted():
    pairs = [(answer, gold) for answer, gold in SAME + [(gold, gold) for gold in GOLDS]]
    texts = [[{"role": "assistant", "content": rf"So $\boxed{{{answer}}}$."}] for answer, _ in pairs]
    accepted = accuracy_reward(texts, [rf"\boxed{{{gold}}}" for _, gold in pairs])
    assert sum(reward == 1.0 for reward in accepted) > 150  # else the next line says little
    assert all(score(*pair) == 1.0 for pair, reward in zip(pairs, accepted, strict=True) if reward == 1.0)


MONSTERS = [
    r"\frac1" * 5000,
    " " * 100_000 + "7",
    "1" * 100_000,
    "{" * 900,
    r"\{" * 300 + "7" + r"\}" * 300 + ",1",
    "(10^9)!",
    r"\binom{10^8}{5\cdot 10^7}",
    r"\sum_{k=1}^{10^9} k^k",
    "9^{9^{9^9}}",
    r"\sin(10^{10^{10}})",
    r"\exp(\exp(\exp(100)))",
    r"\lfloor e^{10^{14}} \rfloor",
    r"\log_{2^5}(\log_{2^4}(\log_{2^3}(2^{2^{2^{2^2}}})))",
    "2^{99999}" * 200,
    "x^{" * 200 + "x" + "}" * 200,
    "1/" * 900 + "2",
    r"\tan(" * 200 + "x" + ")" * 200,
    ",".join(f"{number}!" for number in range(400)),
    r"\pm " * 400,
    r"x \in " * 300,
    r"\{x : " * 200 + "x < 1" + r"\}" * 200,
    "a=" * 900 + "1",
    r"5\%" * 400,
    "_1" * 800,
]


@pytest.mark.parametrize("gold", ["7", "x^2 + 1", "(-1, 2)", "1, 2, 3"])
@pytest.mark.parametrize("answer", MONSTERS, ids=lambda answer: answer[:16])
def test_no_answer_takes_long(answer, gold):
    started = time.perf_counter()
    assert verify_maths(rf"\boxed{{{answer} + 1}}", gold).score == 0.0
    assert verify_maths(rf"\boxed{{{answer}}}", gold).score == 0.0 or answer.strip() == gold
    assert time.perf_counter() - started < 5


def test_it_works_in_a_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(verify_maths(r"\boxed{x+1}", "1+x").score))
    thread.start()
    thread.join()
    assert verdicts == [1.0]
