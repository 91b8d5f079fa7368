# Rscript natural_splines.R > natural_splines.json : ns() of R's package splines
library(splines)
x <- c(1, 2, 3.5, 4, 6, 7, 7.5, 9, 12, 15)
new <- c(-1, 0.5, 5, 8.25, 15, 20)
numbers <- function(v) paste0("[", paste(sprintf("%.17g", v), collapse = ", "), "]")
rows <- function(m) paste0("[", paste(apply(m, 1, numbers), collapse = ",\n    "), "]")
case <- function(options, basis) {
  train <- unclass(basis)[, , drop = FALSE]
  cat(sprintf("  {\"options\": %s,\n   \"train\": %s,\n   \"new\": %s}", options,
              rows(train), rows(unclass(predict(basis, new))[, , drop = FALSE])))
}
cat(sprintf("{\"version\": \"%s\",\n \"x\": %s,\n \"new\": %s,\n \"cases\": [\n",
            R.version.string, numbers(x), numbers(new)))
case("{\"df\": 4}", ns(x, df = 4)); cat(",\n")
case("{\"df\": 4, \"intercept\": true}", ns(x, df = 4, intercept = TRUE)); cat(",\n")
case("{\"knots\": [4, 8], \"boundary_knots\": [0, 16]}",
     ns(x, knots = c(4, 8), Boundary.knots = c(0, 16))); cat(",\n")
case("{\"df\": 3, \"boundary_knots\": [2, 12]}",
     ns(x, df = 3, Boundary.knots = c(2, 12))); cat(",\n")
case("{\"knots\": 6}", ns(x, knots = 6)); cat(",\n")
case("{}", ns(x)); cat("\n]}\n")
