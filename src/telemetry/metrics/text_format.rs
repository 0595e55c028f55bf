//! Prometheus' text format 0.0.4, made from OpenMetrics text: the library writes OpenMetrics alone, which browsers do not show.

/// The same figures in the other format. In it a counter's `HELP` and `TYPE` have the name of its samples, there are fewer types, and
/// neither units nor an end. The figures have no exemplars and no timestamps, which would be written in another way.
pub(super) fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + open_metrics.len() / 16);
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|typed| typed.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "gauge" | "histogram" | "summary" => ("", kind),
                _ => ("", "untyped"),
            };
            if let Some((_, help)) = help.take().filter(|(described, _)| *described == name) {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_as_their_samples_and_units_and_the_end_are_left_out() {
        let open_metrics = "# HELP a_seconds What a is.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\na_seconds_total{b=\"# c\"} 1.5\n\
            # HELP g What g is.\n# TYPE g gauge\ng 0\n# TYPE h histogram\nh_sum 1\nh_count 1\nh_bucket{le=\"+Inf\"} 1\n\
            # HELP i What i is.\n# TYPE i info\ni_info{v=\"1\"} 1\n# HELP u What u is.\n# TYPE u unknown\nu 1\n# EOF\n";
        let expected = "# HELP a_seconds_total What a is.\n# TYPE a_seconds_total counter\na_seconds_total{b=\"# c\"} 1.5\n\
            # HELP g What g is.\n# TYPE g gauge\ng 0\n# TYPE h histogram\nh_sum 1\nh_count 1\nh_bucket{le=\"+Inf\"} 1\n\
            # HELP i_info What i is.\n# TYPE i_info gauge\ni_info{v=\"1\"} 1\n# HELP u What u is.\n# TYPE u untyped\nu 1\n";
        assert_eq!(prometheus_text(open_metrics), expected);
        assert_eq!(prometheus_text("# EOF\n"), "");
    }
}
