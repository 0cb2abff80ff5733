// The widgets' script asks MathJax 2 to set a formula; version 3, which the pages load, is asked in its own words.
if (window.MathJax?.startup) MathJax.Hub = {Queue: ([, , element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element]))};
