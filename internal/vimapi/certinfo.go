package vimapi

import (
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/pki"
)

// secondsTo is how far away a moment is, as far as 32 bits go.
func (s *Server) secondsTo(t time.Time) int32 {
	return int32(max(-1<<31, min(t.Sub(s.clock()).Seconds(), 1<<31-1)))
}

// certificateInfo describes a certificate in PEM for comparison.
func (s *Server) certificateInfo(text, thumbprint string) *types.CryptoManagerKmipCertificateInfo {
	chain, err := pki.ParseCertificates([]byte(text))
	if err != nil || len(chain) == 0 {
		return nil
	}
	cert := chain[0]
	return &types.CryptoManagerKmipCertificateInfo{
		Subject: cert.Subject.String(), Issuer: cert.Issuer.String(), SerialNumber: cert.SerialNumber.String(),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), Fingerprint: thumbprint, CheckTime: s.clock().UTC(),
		SecondsSinceValid: -s.secondsTo(cert.NotBefore), SecondsBeforeExpire: s.secondsTo(cert.NotAfter),
	}
}
