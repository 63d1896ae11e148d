package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Files serves a folder with cert.pem, key.pem and ca.pem to TLS. Before every handshake it looks
// whether the files have changed and reads them again if so; while they cannot be read or do not
// belong together (a copy half done) the last good ones stay in use. Safe for concurrent use.
type Files struct {
	dir string
	now func() time.Time

	mu    sync.Mutex
	stamp [3]fileStamp
	pair  *tls.Certificate
	roots *x509.CertPool
	id    Identity
	fail  error
}

type fileStamp struct {
	size int64
	time time.Time
}

// Load reads a certificate folder. Now is the clock that certificates are checked by.
func Load(dir string, now func() time.Time) (*Files, error) {
	f := &Files{dir: dir, now: now}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refresh(); f.fail != nil {
		return nil, f.fail
	}
	return f, nil
}

// Identity is whom the certificate speaks for.
func (f *Files) Identity() Identity {
	_, _, id := f.current()
	return id
}

// NotAfter is when the certificate in use expires.
func (f *Files) NotAfter() time.Time {
	pair, _, _ := f.current()
	return pair.Leaf.NotAfter
}

// Err is why the newest content of the folder is not in use; nil when it is.
func (f *Files) Err() error {
	f.current()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fail
}

// Server is a TLS configuration for a server that demands a certificate of this installation.
// check, if not nil, sees the caller's identity and may refuse it.
func (f *Files) Server(check func(Identity) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, _, _ := f.current()
			return pair, nil
		},
		// The chain is verified below, against the roots of the moment.
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: f.verifier(x509.ExtKeyUsageClientAuth, check),
		// A resumed session would outlive a change of certificate.
		SessionTicketsDisabled: true,
	}
}

// Client is a TLS configuration for a client. The server must have a service certificate of this
// installation; check, if not nil, sees whose, and may refuse it. The host name in the address is not
// compared: an identity is trusted, not an address.
func (f *Files) Client(check func(Identity) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, _, _ := f.current()
			return pair, nil
		},
		// Only turns off the verification by host name: VerifyConnection verifies the chain and the identity.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: f.verifier(x509.ExtKeyUsageServerAuth, func(id Identity) error {
			if id.Kind != Service {
				return fmt.Errorf("the server's certificate is of %s, not of a service", id)
			}
			if check != nil {
				return check(id)
			}
			return nil
		}),
	}
}

// ErrUntrusted wraps every refusal of the other side's certificate.
var ErrUntrusted = errors.New("certificate refused")

func (f *Files) verifier(usage x509.ExtKeyUsage, check func(Identity) error) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return fmt.Errorf("%w: none was sent", ErrUntrusted)
		}
		_, roots, _ := f.current()
		opts := x509.VerifyOptions{
			Roots: roots, Intermediates: x509.NewCertPool(),
			CurrentTime: f.now(), KeyUsages: []x509.ExtKeyUsage{usage},
		}
		for _, c := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(c)
		}
		leaf := cs.PeerCertificates[0]
		if _, err := leaf.Verify(opts); err != nil {
			return fmt.Errorf("%w: %w", ErrUntrusted, err)
		}
		id, err := FromCertificate(leaf)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUntrusted, err)
		}
		if check != nil {
			if err := check(id); err != nil {
				return fmt.Errorf("%w: %w", ErrUntrusted, err)
			}
		}
		return nil
	}
}

func (f *Files) current() (*tls.Certificate, *x509.CertPool, Identity) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refresh()
	return f.pair, f.roots, f.id
}

// refresh reads the folder if its files changed. Called with the lock held. The stamp is taken before
// the files are read and kept only after a good read, so that a change in between is seen next time.
func (f *Files) refresh() {
	var stamp [3]fileStamp
	for i, name := range []string{CertFile, KeyFile, CAFile} {
		info, err := os.Stat(filepath.Join(f.dir, name))
		if err != nil {
			f.fail = fmt.Errorf("read certificates: %w", err)
			return
		}
		stamp[i] = fileStamp{info.Size(), info.ModTime()}
	}
	if stamp == f.stamp && f.pair != nil {
		f.fail = nil
		return
	}
	f.fail = f.read()
	if f.fail == nil {
		f.stamp = stamp
	}
}

func (f *Files) read() error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(f.dir, CertFile), filepath.Join(f.dir, KeyFile))
	if err != nil {
		return fmt.Errorf("read the certificate in %s: %w", f.dir, err)
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return fmt.Errorf("read the certificate in %s: %w", f.dir, err)
		}
	}
	id, err := FromCertificate(pair.Leaf)
	if err != nil {
		return fmt.Errorf("read the certificate in %s: %w", f.dir, err)
	}
	ca, err := os.ReadFile(filepath.Join(f.dir, CAFile))
	if err != nil {
		return fmt.Errorf("read certificates: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return fmt.Errorf("read %s: no certificate in it", filepath.Join(f.dir, CAFile))
	}
	f.pair, f.roots, f.id = &pair, roots, id
	return nil
}
