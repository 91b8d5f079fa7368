# R peers as workers of the runner: lme4 and glmmTMB, with their default controls.
# The conversation is that of protocol.py: JSON, one record a line.

compared <- 100 # responses refitted in one call

say <- function(...) {
  cat(jsonlite::toJSON(list(...), auto_unbox = TRUE, digits = NA, na = "null"), "\n", sep = "")
  flush(stdout())
}

now <- function() as.numeric(Sys.time())

peak_mb <- function() {
  if (!file.exists("/proc/self/status")) return(NA)
  line <- grep("^VmHWM", readLines("/proc/self/status"), value = TRUE)
  as.numeric(gsub("[^0-9]", "", line)) / 1e3
}

read_frame <- function(request) {
  frame <- utils::read.csv(request$data)
  for (column in unlist(request$factors)) frame[[column]] <- factor(frame[[column]])
  frame
}

fitter <- function(request, frame) {
  formula <- stats::as.formula(request$formula)
  if (request$distribution != "gaussian") {
    family <- get(request$distribution, envir = asNamespace("stats"))
    return(switch(request$engine,
      lme4 = function() lme4::glmer(formula, frame, family = family),
      glmmTMB = function() glmmTMB::glmmTMB(formula, frame, family = family)
    ))
  }
  switch(request$engine,
    lme4 = function() lme4::lmer(formula, frame, REML = request$reml),
    glmmTMB = function() glmmTMB::glmmTMB(formula, frame, REML = request$reml)
  )
}

# lme4's refit() may count one fixed effect where REML needs all p of them
refit_note <- function(ms) {
  if (!lme4::isLMM(ms[[1]])) return("")
  counted <- lme4::getME(ms[[1]], "devcomp")$dims[["REML"]]
  p <- length(lme4::fixef(ms[[1]]))
  if (counted %in% c(0, p)) return("")
  sprintf("refit() takes %d for p = %d in the REML criterion", counted, p)
}

# a list with call, objective, n, fits and note, as Job in protocol.py
prepare <- function(request) {
  frame <- read_frame(request)
  fit <- fitter(request, frame)
  objective <- function(m) -2 * as.numeric(stats::logLik(m))
  no_note <- function(m) ""
  if (is.null(request$responses)) {
    return(list(call = fit, objective = objective, n = nrow(frame), fits = 1, note = no_note))
  }
  ys <- utils::read.csv(request$responses)[seq_len(compared)]
  m <- fit()
  response <- function(y) y
  if (request$distribution == "binomial") {
    response <- function(y) cbind(y, frame$size - y)
  }
  list(
    call = function() lapply(ys, function(y) lme4::refit(m, response(y))),
    objective = function(ms) mean(vapply(ms, objective, 0)),
    n = nrow(frame), fits = length(ys), note = refit_note
  )
}

round_of <- function(job, min_time) {
  invisible(gc())
  seconds <- numeric(0)
  while (sum(seconds) < min_time) {
    start <- now()
    job$call()
    seconds <- c(seconds, now() - start)
  }
  stats::median(seconds) / job$fits
}

main <- function() {
  input <- file("stdin")
  open(input)
  if (!requireNamespace("jsonlite", quietly = TRUE)) {
    cat('{"status": "not installed", "note": "R package jsonlite"}\n')
    return(invisible())
  }
  request <- jsonlite::fromJSON(readLines(input, 1))
  if (!requireNamespace(request$engine, quietly = TRUE)) {
    say(status = "not installed", note = paste("R package", request$engine))
    return(invisible())
  }
  base <- peak_mb()
  job <- prepare(request)
  start <- now()
  result <- job$call()
  first <- now() - start
  version <- paste0(
    request$engine, " ", utils::packageVersion(request$engine), ", R ", getRversion()
  )
  say(
    status = "ok", version = version, n = job$n, first_s = first / job$fits,
    objective = job$objective(result), base_mb = base, note = job$note(result)
  )
  while (length(readLines(input, 1)) > 0) say(seconds = round_of(job, request$min_time))
}

suppressMessages(suppressWarnings(main()))
