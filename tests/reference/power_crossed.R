# Fit the data sets of power_crossed.py with lme4, one after another, as simr does.
#
#     Rscript power_crossed.R DATA.csv OUT.csv
#
# DATA.csv has the columns subject, item, x and y0, y1, ...; OUT.csv gets a row for each
# of these: estimate and standard error of x, -2 log L (REML), and mean and variance of
# y as R read it.
suppressMessages(library(lme4))
files <- commandArgs(TRUE)
data <- read.csv(files[1])
data$subject <- factor(data$subject)
data$item <- factor(data$item)
start <- proc.time()[["elapsed"]]
rows <- lapply(grep("^y[0-9]+$", names(data), value = TRUE), function(name) {
  data$y <- data[[name]]
  m <- lmer(y ~ x + (x | subject) + (x | item), data, REML = TRUE,
            control = lmerControl(optimizer = "bobyqa", calc.derivs = FALSE,
                                  optCtrl = list(rhoend = 1e-9, maxfun = 1e5)))
  stopifnot(m@optinfo$conv$opt == 0)
  data.frame(estimate = fixef(m)[["x"]], se = sqrt(vcov(m)["x", "x"]),
             objective = -2 * as.numeric(logLik(m)), mean = mean(data$y),
             variance = var(data$y))
})
took <- proc.time()[["elapsed"]] - start
out <- do.call(rbind, rows)
out[] <- lapply(out, format, digits = 17, trim = TRUE)
write.csv(out, files[2], row.names = FALSE, quote = FALSE)
cat(R.version$major, ".", R.version$minor, " ", format(packageVersion("lme4")), " ",
    took / nrow(out), "\n", sep = "")
