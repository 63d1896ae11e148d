package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"time"
)

// The files of a certificate folder.
const (
	// CertFile holds the certificate, PEM.
	CertFile = "cert.pem"
	// KeyFile holds its private key, PKCS #8 in PEM, mode 0600.
	KeyFile = "key.pem"
	// CAFile holds the CA certificates to trust, PEM; several during a change of CA.
	CAFile = "ca.pem"

	caKeyFile = "ca-key.pem"
)

const (
	// CALifetime is how long a new CA is valid.
	CALifetime = 10 * 365 * 24 * time.Hour
	// DefaultLifetime is how long a certificate is valid if the request does not say.
	DefaultLifetime = 365 * 24 * time.Hour
	// clockSkew is how far clocks of one installation may differ: certificates begin that much earlier.
	clockSkew = 10 * time.Minute
)

// Authority issues certificates. Safe for concurrent use, also by several processes on one folder.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	now  func() time.Time
}

// Open loads the CA of a folder, or creates it (folder 0700, keys 0600, ECDSA P-256). Now is the clock
// that certificates are dated and checked by. Errors name the file; a damaged CA is never overwritten.
func Open(dir string, now func() time.Time) (*Authority, error) {
	if err := makeDir(dir, now()); err != nil {
		return nil, fmt.Errorf("open the CA in %s: %w", dir, err)
	}
	a := &Authority{dir: dir, now: now}
	var err error
	if a.key, err = ensureKey(filepath.Join(dir, caKeyFile)); err != nil {
		return nil, fmt.Errorf("open the CA: %w", err)
	}
	path := filepath.Join(dir, CAFile)
	if a.pem, err = createOnly(path, 0o644, a.selfSign); err != nil {
		return nil, fmt.Errorf("open the CA: %w", err)
	}
	if a.cert, err = firstCertificate(a.pem); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if !a.key.PublicKey.Equal(a.cert.PublicKey) {
		return nil, fmt.Errorf("%s and %s do not belong together", path, caKeyFile)
	}
	if now().After(a.cert.NotAfter) {
		return nil, fmt.Errorf("%s expired at %s", path, a.cert.NotAfter.Format(time.RFC3339))
	}
	return a, nil
}

// Certificate returns the CA's certificates in PEM, for others to trust.
func (a *Authority) Certificate() []byte { return bytes.Clone(a.pem) }

// Request says whom a certificate is for.
type Request struct {
	// Identity stands in the certificate as URIs.
	Identity Identity
	// Names are DNS names and IP addresses under which foreign clients (NATS, browsers) reach the
	// service, beside localhost, 127.0.0.1 and ::1, which every service certificate has.
	Names []string
	// Lifetime is how long the certificate is valid; zero means DefaultLifetime.
	Lifetime time.Duration
}

// Ensure makes dir hold a valid certificate for the request: cert.pem, key.pem and ca.pem. What is there
// stays if it is of this CA, for the same identity and names, and has more than a third of its life
// left; otherwise the certificate is renewed with the key that is there. It reports whether a new one
// was issued. Safe to call from several processes at once and after a kill at any point.
func (a *Authority) Ensure(dir string, req Request) (issued bool, err error) {
	if err := req.Identity.Validate(); err != nil {
		return false, fmt.Errorf("issue a certificate: %w", err)
	}
	if err := makeDir(dir, a.now()); err != nil {
		return false, fmt.Errorf("issue a certificate for %s: %w", req.Identity, err)
	}
	key, err := ensureKey(filepath.Join(dir, KeyFile))
	if err != nil {
		return false, fmt.Errorf("issue a certificate for %s: %w", req.Identity, err)
	}
	caPath := filepath.Join(dir, CAFile)
	if have, err := createOnly(caPath, 0o644, func() ([]byte, error) { return a.pem, nil }); err != nil {
		return false, err
	} else if !bytes.Contains(have, a.pem) {
		if err := replace(caPath, 0o644, a.pem); err != nil {
			return false, err
		}
	}
	path := filepath.Join(dir, CertFile)
	first := false
	data, err := createOnly(path, 0o644, func() ([]byte, error) {
		first = true
		return a.sign(req, key)
	})
	if err != nil {
		return false, fmt.Errorf("issue a certificate for %s: %w", req.Identity, err)
	}
	if a.good(data, req, key) {
		return first, nil
	}
	if data, err = a.sign(req, key); err != nil {
		return false, err
	}
	if err := replace(path, 0o644, data); err != nil {
		return false, fmt.Errorf("renew the certificate of %s: %w", req.Identity, err)
	}
	return true, nil
}

// good reports whether a certificate may stay.
func (a *Authority) good(data []byte, req Request, key *ecdsa.PrivateKey) bool {
	cert, err := firstCertificate(data)
	if err != nil || !key.PublicKey.Equal(cert.PublicKey) || cert.CheckSignatureFrom(a.cert) != nil {
		return false
	}
	id, err := FromCertificate(cert)
	if err != nil || !id.Equal(req.Identity) {
		return false
	}
	dns, ips := req.names()
	if !slices.Equal(dns, cert.DNSNames) || !slices.EqualFunc(ips, cert.IPAddresses, net.IP.Equal) {
		return false
	}
	return cert.NotAfter.Sub(a.now()) > cert.NotAfter.Sub(cert.NotBefore)/3
}

func (a *Authority) selfSign() ([]byte, error) {
	now := a.now()
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Landfall CA", Organization: []string{"Landfall"}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(CALifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	return create(t, t, &a.key.PublicKey, a.key)
}

func (a *Authority) sign(req Request, key *ecdsa.PrivateKey) ([]byte, error) {
	life := req.Lifetime
	if life == 0 {
		life = DefaultLifetime
	}
	now := a.now()
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: req.Identity.Name, Organization: []string{"Landfall"}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(life),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:                  req.Identity.URIs(),
	}
	if t.NotAfter.After(a.cert.NotAfter) {
		t.NotAfter = a.cert.NotAfter
	}
	if req.Identity.Kind == Service {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		t.DNSNames, t.IPAddresses = req.names()
	}
	return create(t, a.cert, &key.PublicKey, a.key)
}

// names are the DNS names and addresses of a service certificate; users have none.
func (r Request) names() (dns []string, ips []net.IP) {
	if r.Identity.Kind != Service {
		return nil, nil
	}
	dns, ips = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, n := range r.Names {
		if ip := net.ParseIP(n); ip != nil {
			if !slices.ContainsFunc(ips, ip.Equal) {
				ips = append(ips, ip)
			}
		} else if !slices.Contains(dns, n) {
			dns = append(dns, n)
		}
	}
	return dns, ips
}

func create(t, parent *x509.Certificate, pub *ecdsa.PublicKey, signer *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, signer)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return n.Add(n, big.NewInt(1))
}

// ensureKey loads a private key or creates it, mode 0600.
func ensureKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := createOnly(path, 0o600, func() ([]byte, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
	if err != nil {
		return nil, err
	}
	if err := checkPrivate(path); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("read %s: no PEM block", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("read %s: not an ECDSA key", path)
	}
	return key, nil
}

func firstCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}
