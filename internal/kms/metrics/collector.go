package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// collector makes metrics of a KMS's facts each time Prometheus asks.
type collector struct {
	m   *Metrics
	src Source
}

// Describe says nothing: which metrics there are depends on the instances.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect is called when Prometheus asks.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(name, help string, v float64, labels ...string) {
		names, values := []string{}, []string{}
		for i := 0; i+1 < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), prometheus.GaugeValue, v, values...)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("mortise_kms_build_info", "Always 1; the version is a label.", 1, "version", c.m.o.Version)
	gauge("mortise_kms_ready", "1 while this member serves, as /readyz says.", truth(len(c.src.Unready()) == 0))
	if c.m.o.ServerCertificate != nil {
		gauge("mortise_kms_server_certificate_expiry_seconds", "When the KMIP server's certificate ends, Unix time.", float64(c.m.o.ServerCertificate().Unix()))
	}
	f, err := c.src.Facts()
	if err != nil {
		c.m.o.Logger.Warn("metrics: the key server's figures cannot be read", "error", err)
		return
	}
	gauge("mortise_kms_locked", "1 while the root keys are missing.", truth(f.Locked))
	gauge("mortise_kms_quarantined", "1 while a restored server waits for its release.", truth(f.Quarantined))
	for _, i := range f.Instances {
		for state, n := range i.Keys {
			gauge("mortise_kms_keys", "Objects by state. One whose date will change its state is counted in both.", float64(n), "instance", i.ID, "state", state)
		}
		for _, x := range i.Clients {
			gauge("mortise_kms_client_certificate_expiry_seconds", "When a client certificate is no longer accepted, Unix time.", float64(x.Ends.Unix()),
				"instance", i.ID, "client", x.Name, "fingerprint", x.Fingerprint)
		}
	}
	a := f.Audit
	gauge("mortise_kms_audit_entries", "Entries in the audit log, ever.", float64(a.Entries))
	gauge("mortise_kms_audit_bytes", "Bytes of the audit log's segments.", float64(a.Bytes))
	gauge("mortise_kms_audit_segments", "Segments of the audit log.", float64(a.Segments))
	gauge("mortise_kms_audit_waiting_entries", "Entries of changes that are not in the log yet.", float64(a.Waiting))
	gauge("mortise_kms_audit_unanchored_entries", "Entries that no signed head in the store covers.", float64(a.Entries-min(a.Entries, a.Anchored)))
	gauge("mortise_kms_audit_refusing", "1 while nothing can be audited, and so nothing is done.", truth(a.Problem != ""))
	for _, s := range a.Sinks {
		gauge("mortise_kms_audit_sink_failing", "1 while anchors cannot be brought there.", truth(!s.Failing.IsZero()), "sink", s.Name)
		gauge("mortise_kms_audit_sink_unanchored_entries", "Entries that no anchor there covers.", float64(a.Entries-min(a.Entries, s.Anchored)), "sink", s.Name)
	}
	s := f.Store
	gauge("mortise_kms_etcd_leader", "1 on the member that leads.", truth(s.Leader))
	gauge("mortise_kms_etcd_has_leader", "1 while a majority of the cluster is in reach.", truth(s.HasLeader))
	gauge("mortise_kms_etcd_members", "Members of the cluster.", float64(s.Members))
	gauge("mortise_kms_etcd_apply_lag", "Entries of raft's log that are decided and not applied here.", float64(s.Committed-min(s.Committed, s.Applied)))
	gauge("mortise_kms_etcd_db_bytes", "Bytes of the database's file.", float64(s.Size))
	gauge("mortise_kms_etcd_db_in_use_bytes", "Bytes of it that are in use.", float64(s.InUse))
	gauge("mortise_kms_etcd_quota_bytes", "Where writes are refused.", float64(s.Quota))
}
