package azure

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"
)

// renewEvery is how often the file of a SAS or connection string is read again.
const renewEvery = time.Second

// renewal is the SAS or the key that requests carry. It follows the file that the settings took it from: what expires can be
// renewed while the program runs. It is a policy of the SDK's pipeline, before the signing.
type renewal struct {
	conn connection // as it was opened; only its key and SAS may change
	key  *service.SharedKeyCredential
	sas  atomic.Pointer[string]

	mu       sync.Mutex
	settings Settings
	looked   time.Time
}

// Do adds the SAS to a request.
func (r *renewal) Do(req *policy.Request) (*http.Response, error) {
	r.look(time.Now())
	if sas := r.sas.Load(); sas != nil {
		u := req.Raw().URL
		if u.RawQuery != "" {
			u.RawQuery += "&"
		}
		u.RawQuery += *sas
	}
	return req.Next()
}

// look takes over what the file says now. A file that cannot be read, or says what cannot be used here, is one in the middle
// of its renewal: what was known goes on to be used, and the service says when that is not good any more.
func (r *renewal) look(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.looked.IsZero() || now.Sub(r.looked) < renewEvery {
		if r.looked.IsZero() { // it was just read
			r.looked = now
		}
		return
	}
	r.looked = now
	secret := &r.settings.SAS
	if r.settings.Kind() == ConnectionString {
		secret = &r.settings.ConnectionString
	}
	next, from, err := secret.Again()
	if !from || err != nil || next == *secret {
		return
	}
	was := *secret
	*secret = next
	conn, err := r.settings.endpoint(r.conn.url)
	if err != nil || r.settings.Validate() != nil || conn.account != r.conn.account || (conn.key == "") != (r.key == nil) || (conn.sas == "") != (r.sas.Load() == nil) {
		*secret = was
		return
	}
	if r.key != nil && r.key.SetAccountKey(conn.key) != nil {
		*secret = was
		return
	}
	if conn.sas != "" {
		r.sas.Store(&conn.sas)
	}
}
