//! What the process itself uses, under the names that every Prometheus client gives it: read from `/proc` at each scrape, so that
//! nothing is paid between two of them. Elsewhere than on Linux only the start time is known.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Metrics;
use super::series::{Figure, Kind};

impl Metrics {
    /// Adds the figures of this process.
    pub(super) fn observe_process(&mut self) {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let figure = Figure::seconds("process_start_time", "When the process started, as Unix time");
        self.observe(Kind::Gauge, figure, move || started);
        #[cfg(target_os = "linux")]
        self.observe_proc();
    }

    #[cfg(target_os = "linux")]
    fn observe_proc(&mut self) {
        use procfs::process::{LimitValue, Process};

        use super::series::unlabelled;

        let mut add = |kind, figure, read: fn(Process) -> Option<f64>| {
            // A file that cannot be read gives no value rather than a wrong one.
            self.observe_each(kind, figure, move || {
                Process::myself().ok().and_then(read).map(unlabelled).into_iter().collect()
            });
        };
        let cpu = Figure::seconds("process_cpu", "Processor time that the process has used");
        add(Kind::Counter, cpu, |me| {
            let stat = me.stat().ok()?;
            Some((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
        });
        let resident = Figure::bytes("process_resident_memory", "Memory of the process that is in RAM");
        add(Kind::Gauge, resident, |me| Some(me.stat().ok()?.rss as f64 * procfs::page_size() as f64));
        let virtual_memory = Figure::bytes("process_virtual_memory", "Address space of the process");
        add(Kind::Gauge, virtual_memory, |me| Some(me.stat().ok()?.vsize as f64));
        let threads = Figure::new("process_threads", "Threads of the process");
        add(Kind::Gauge, threads, |me| Some(me.stat().ok()?.num_threads as f64));
        let open = Figure::new("process_open_fds", "Open file descriptors, connections among them");
        add(Kind::Gauge, open, |me| Some(me.fd_count().ok()? as f64));
        let most = Figure::new("process_max_fds", "File descriptors that the process may open");
        add(Kind::Gauge, most, |me| match me.limits().ok()?.max_open_files.soft_limit {
            LimitValue::Value(limit) => Some(limit as f64),
            LimitValue::Unlimited => Some(f64::INFINITY),
        });
    }

    /// Adds the figures of the runtime that the server runs on.
    pub fn observe_runtime(&mut self, runtime: &tokio::runtime::Handle) {
        let gauge = |name, help| Figure::new(name, help);
        let metrics = runtime.metrics();
        self.observe(Kind::Gauge, gauge("tokio_workers", "Threads that run tasks"), move || {
            metrics.num_workers() as f64
        });
        let metrics = runtime.metrics();
        let help = "Tasks that have not ended: connections, requests, and the server's own";
        self.observe(Kind::Gauge, gauge("tokio_alive_tasks", help), move || metrics.num_alive_tasks() as f64);
        let metrics = runtime.metrics();
        let help = "Tasks that wait in the queue that the workers share; growing, when they do not keep up";
        self.observe(Kind::Gauge, gauge("tokio_global_queue_depth", help), move || metrics.global_queue_depth() as f64);
        #[cfg(target_has_atomic = "64")]
        {
            let metrics = runtime.metrics();
            let busy = Figure::seconds("tokio_workers_busy", "Time that the workers were busy, all of them together");
            self.observe(Kind::Counter, busy, move || {
                (0..metrics.num_workers()).map(|worker| metrics.worker_total_busy_duration(worker).as_secs_f64()).sum()
            });
        }
    }
}
