// Package metrics tells Prometheus how a KMS fares, and load balancers whether to
// send it requests.
//
// Place in the flow: level 2, over kms, whose facts it reads when it is asked;
// kms/kmipd and the audit log report each request and each sync to it. cmd/mortise
// puts them together.
//
//	GET /metrics   for Prometheus
//	GET /healthz   200 while the process lives
//	GET /readyz    200 while it serves; 503 and the reasons, as JSON, while not
//
// The listener is for the machine itself or a management network: it has no
// log-in and shows names of instances and clients, never of keys.
package metrics

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"mortise/internal/kms"
)

// A Source is what is measured when Prometheus asks.
type Source interface {
	Facts() (kms.Facts, error)
	Unready() []kms.Reason
}

// Options of the metrics of one KMS.
type Options struct {
	// ServerCertificate tells when the KMIP server's certificate ends; nil: not
	// known.
	ServerCertificate func() time.Time
	Version           string
	Logger            *slog.Logger // nil: none
}

// Metrics counts what the KMS does. Its methods may be called concurrently.
type Metrics struct {
	o        Options
	registry *prometheus.Registry

	requests   *prometheus.CounterVec
	latency    *prometheus.HistogramVec
	open       prometheus.Gauge
	opened     prometheus.Counter
	refused    prometheus.Counter
	handshakes prometheus.Counter
	auditSync  prometheus.Histogram
	auditBatch prometheus.Histogram
}

// New makes metrics that are all zero.
func New(o Options) *Metrics {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Metrics{o: o, registry: prometheus.NewRegistry()}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mortise_kms_requests_total", Help: "KMIP operations, by how they ended: Success or the KMIP result reason.",
	}, []string{"operation", "instance", "result"})
	m.latency = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "mortise_kms_request_seconds", Help: "How long KMIP operations took, their audit entries included.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"operation", "instance"})
	m.open = prometheus.NewGauge(prometheus.GaugeOpts{Name: "mortise_kms_connections", Help: "KMIP connections that are open."})
	m.opened = counter("mortise_kms_connections_opened_total", "KMIP connections that were taken.")
	m.refused = counter("mortise_kms_connections_refused_total", "KMIP connections that were closed because too many were open.")
	m.handshakes = counter("mortise_kms_handshake_failures_total", "TLS handshakes that failed; vCenter's health poll is one each time.")
	m.auditSync = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "mortise_kms_audit_sync_seconds", Help: "How long a write of the audit log and its sync took.",
		Buckets: prometheus.ExponentialBuckets(.00005, 2, 16),
	})
	m.auditBatch = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "mortise_kms_audit_sync_entries", Help: "How many entries a sync of the audit log made durable.",
		Buckets: prometheus.ExponentialBuckets(1, 2, 12),
	})
	m.registry.MustRegister(m.requests, m.latency, m.open, m.auditSync, m.auditBatch,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Opened counts a connection that is taken; Closed that it is gone.
func (m *Metrics) Opened() { m.open.Inc(); m.opened.Inc() }

// Closed counts that a connection that was taken is gone.
func (m *Metrics) Closed() { m.open.Dec() }

// Shed counts a connection that was closed because too many are open.
func (m *Metrics) Shed() { m.refused.Inc() }

// HandshakeFailed counts a TLS handshake that failed.
func (m *Metrics) HandshakeFailed() { m.handshakes.Inc() }

// Answered counts an operation. instance is one that exists, operation and result
// are KMIP's names, so that what a client makes up does not become a label.
func (m *Metrics) Answered(operation, instance, result string, took time.Duration) {
	m.requests.WithLabelValues(operation, instance, result).Inc()
	m.latency.WithLabelValues(operation, instance).Observe(took.Seconds())
}

// AuditSynced counts a sync of the audit log.
func (m *Metrics) AuditSynced(entries int, took time.Duration) {
	m.auditSync.Observe(took.Seconds())
	m.auditBatch.Observe(float64(entries))
}

// Handler serves the three paths for one KMS.
func (m *Metrics) Handler(src Source) (http.Handler, error) {
	all := prometheus.NewRegistry()
	if err := all.Register(&collector{m: m, src: src}); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	gather := prometheus.Gatherers{m.registry, all, prometheus.GathererFunc(etcdMetrics)}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(gather, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(m.o.Logger.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, map[string]string{"status": "alive"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		reasons := src.Unready()
		status, word := http.StatusOK, "ready"
		if len(reasons) > 0 {
			status, word = http.StatusServiceUnavailable, "not ready"
		}
		answer(w, status, Readiness{word, reasons})
	})
	return mux, nil
}

// Readiness is the answer of /readyz.
type Readiness struct {
	Status  string       `json:"status"` // "ready" or "not ready"
	Reasons []kms.Reason `json:"reasons"`
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// Serve answers on l until ctx ends.
func (m *Metrics) Serve(ctx context.Context, l net.Listener, src Source) error {
	h, err := m.Handler(src)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(m.o.Logger.Handler(), slog.LevelDebug),
	}
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		defer close(stopped)
		last, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			srv.Close()
		}
	})()
	if err := srv.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("metrics: serving %s: %w", l.Addr(), err)
	}
	<-stopped
	return nil
}

// etcdMetrics are those of etcd's own that tell of its disk, its leader and its
// proposals. etcd keeps them in the process's default registry.
func etcdMetrics() ([]*dto.MetricFamily, error) {
	all, err := prometheus.DefaultGatherer.Gather()
	var some []*dto.MetricFamily
	for _, f := range all {
		for _, prefix := range []string{"etcd_disk_", "etcd_server_", "etcd_network_peer_round_trip", "etcd_mvcc_db_total_size"} {
			if strings.HasPrefix(f.GetName(), prefix) {
				some = append(some, f)
				break
			}
		}
	}
	return some, err
}
